"""What of the extension works on this machine: ``fairseq-sparsemixer check``.

- :mod:`.parts`: what is installed, which devices there are, which backends serve them.
- :mod:`.round_trip`: fairseq's and our commands on a toy language, from text to a translation.
"""
