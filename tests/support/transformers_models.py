"""Models of transformers, to test against."""

import sys

import pytest


def modeling(name):
    """The module of the model ``name``."""
    with pytest.MonkeyPatch.context() as patch:
        # transformers imports it where it is installed, and it may not fit this torch.
        patch.setitem(sys.modules, "torchaudio", None)
        return pytest.importorskip(f"transformers.models.{name}.modeling_{name}")
