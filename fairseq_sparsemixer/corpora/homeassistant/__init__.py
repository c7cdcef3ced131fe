"""The corpus ``homeassistant``: user-interface messages of Home Assistant, from a pinned wheel.

===============  ==================================================
``preparation``  the door: from the wheel to ``bin/``
``extraction``   pairs of messages, and how the corpus is divided
``wheels``       the wheel: given, cached or downloaded with pip
===============  ==================================================
"""
