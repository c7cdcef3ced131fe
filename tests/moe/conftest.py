"""Fixtures of the routers' tests."""

import pytest
import torch


@pytest.fixture
def in_double(monkeypatch):
    """Routers compute in float64 where they would cast to float32."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
