"""The version of the package, and those that it needs of others: what setup.py says too."""

__version__ = "0.1.0"

MINIMUM_PYTHON = "3.11"
TOO_NEW_PYTHON = "3.13"
"""The first that there are no wheels of fairseq for."""
MINIMUM_TORCH = "2.6"
FAIRSEQ = "0.12.3"
"""As ve-fairseq: releases of fairseq's own are older, and fail at import on these Pythons."""
