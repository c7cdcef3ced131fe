"""Layers and tables of logits for the tests of routers."""

import math

import pytest
import torch

from fairseq_sparsemixer.moe import ROUTERS, MoEFeedForward, Router, Routing

OF_ANY_TEXT = sorted(name for name, router in ROUTERS.items() if not router.needs_languages)
"""Routers whose models any task trains."""


class FixedRouter(Router):
    """Sends tokens where the test says."""

    max_top_k = None

    def __init__(self, index_TK, gate_TK, **options):
        super().__init__(top_k=index_TK.shape[1], **options)
        self.index_TK, self.gate_TK = index_TK, gate_TK

    def select(self, logits_TN, context):
        probs = logits_TN.softmax(-1)
        return Routing(self.index_TK, self.gate_TK, logits_TN, probs, probs)


def random_layer(name, num_experts, top_k=None, **options):
    """A layer with nothing left at its initial value."""
    top_k = ROUTERS[name].min_top_k if top_k is None else top_k
    layer = MoEFeedForward(6, 10, num_experts, router=name, top_k=top_k, **options)
    router = layer.router
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    if hasattr(router.expert_means, "mean"):
        torch.nn.init.normal_(router.expert_means.mean)
    if router.balance_bias is not None:
        torch.nn.init.normal_(router.balance_bias.bias)
    return layer


def chi_square(counts, probs):
    """Fails for counts that probability 0 excludes, or with a chance below one in 10,000."""
    counts, probs = counts.double().flatten(), probs.double().flatten()
    assert probs.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert counts[probs == 0].sum() == 0
    expected = probs[probs > 0] * counts.sum()
    assert expected.min() > 5, "too few draws for the test"
    value = ((counts[probs > 0] - expected) ** 2 / expected).sum().item()
    degrees = len(expected) - 1
    if degrees == 0:
        return
    # Quantile of Wilson and Hilferty, 3.72 of the normal one.
    scale = 2 / (9 * degrees)
    assert value < degrees * (1 - scale + 3.72 * math.sqrt(scale)) ** 3
