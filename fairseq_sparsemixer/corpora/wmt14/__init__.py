"""The corpus ``wmt14``: WMT14 English-German, from archives of statmt.org.

===============  ======================================================================
``preparation``  the door: from archives or own text to ``bin/``, in two pipelines
``extraction``   which archives, and what of them becomes ``raw/``
``filtering``    which training pairs are kept, as text or as Moses tokens
===============  ======================================================================
"""
