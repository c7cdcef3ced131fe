"""The version of the package, and the least that it takes: what setup.py says too."""

__version__ = "0.1.0"

MINIMUM_TORCH = "2.6"
"""Of PyTorch."""
