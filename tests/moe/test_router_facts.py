"""What routers say of themselves, against what they do.

Other tests read these facts to choose what they try, so that a wrong one would leave out the test
that would notice it.
"""

import pytest
import torch
from support.reference_routers import ids
from support.routers import random_layer

from fairseq_sparsemixer.moe import ROUTERS, MoEFeedForward, build_router

SEVERAL = (1, None)
TOP_K = {
    "topk": SEVERAL,
    "gshard": (2, 2),
    "noisy-topk": (2, None),
    "default-moe": SEVERAL,
    "expert-choice": SEVERAL,
    "sparsemixer-v2": SEVERAL,
    "sparsemixer-v2-star": SEVERAL,
}
"""The smallest and the largest number of experts of a token, where it is not one."""

WITH_OMEGA = {"composed", "switch-omega", "sparsemixer-1st", "sparsemixer", "sparsemixer-cv"}


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_how_many_experts_a_token_may_have(name):
    least, most = TOP_K.get(name, (1, 1))
    for top_k in range(1, 6):
        try:
            MoEFeedForward(6, 4, 5, router=name, top_k=top_k)
            accepted = True
        except ValueError:
            accepted = False
        assert accepted == (least <= top_k <= (most or 5)), top_k


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_the_output_is_multiplied_by_omega_where_there_is_one(name):
    torch.manual_seed(0)
    layer = random_layer(name, 4).eval()
    omega = layer.router.output_scale
    assert (omega is not None) == (name in WITH_OMEGA)
    if omega is None:
        return
    fresh = MoEFeedForward(6, 4, 4, router=name).router.output_scale
    assert torch.equal(fresh, torch.ones(6))
    x = torch.randn(9, 6)
    scaled = layer(x)[0]
    with torch.no_grad():
        before = omega.clone()
        omega.fill_(1.0)
    torch.testing.assert_close(scaled, before * layer(x)[0])


@pytest.mark.parametrize("name", ["sparsemixer-1st", "sparsemixer", "sparsemixer-cv"])
def test_omega_can_be_left_out(name):
    assert build_router(name, embed_dim=6, num_experts=4, omega=False).output_scale is None


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_routers_do_what_they_say_of_themselves(name):
    torch.manual_seed(0)
    kind, layer = ROUTERS[name], random_layer(name, 4)
    x, token_ids = torch.randn(9, 6), torch.arange(9)
    named = ids(name, token_ids)

    if not kind.needs_token_ids:
        plain = layer.eval()(x)[0]
        assert torch.equal(plain, layer(x, token_ids=token_ids)[0])

    index = layer.train()(x, **named)[1].expert_index.sort(-1).values
    assert kind.computes_all_experts == torch.equal(index, torch.arange(4).expand(9, 4))

    together = layer.eval()(x, **named)[1].expert_index
    alone = [layer(x[t : t + 1], **ids(name, token_ids[t : t + 1]))[1] for t in range(9)]
    alone = torch.cat([routing.expert_index for routing in alone])
    assert kind.causal == torch.equal(together, alone)

    means = layer.router.expert_means
    if means is None:
        assert not kind.adds_means
    else:
        y = layer(x, **named)[0]
        means.mean += 1
        assert kind.adds_means == (not torch.equal(y, layer(x, **named)[0]))


def test_which_routers_take_a_balance_bias():
    """What chooses by logits; expert choice is balanced, and noisy top-k has losses of its own."""
    none = {name for name, kind in ROUTERS.items() if not kind.takes_balance_bias}
    assert none == {"hash", "language", "random", "expert-choice", "noisy-topk"}


def test_the_balance_loss_that_a_router_needs():
    """The usual one does, but for ReinMax (docs/routers.md)."""
    weights = {name: kind.balance_weight for name, kind in ROUTERS.items()}
    assert {name: weight for name, weight in weights.items() if weight is not None} == {
        "reinmax": 0.05
    }


def test_what_a_router_is_without_being_asked():
    """What is no flag; for those see tests/models/test_defaults.py."""
    assert MoEFeedForward(6, 10, 4).observing
    for name in ("sparsemixer", "sparsemixer-cv"):
        router = build_router(name, embed_dim=6, num_experts=4)
        assert (router.quadrature, router.first_order_on_argmax) == ("midpoint", True)
    for name in ("default-moe", "sparsemixer-cv"):
        means = build_router(name, embed_dim=6, num_experts=4).expert_means
        assert (type(means).__name__, means.decay) == ("ExpertMeans", 0.99)
    assert not build_router("topk", embed_dim=6, num_experts=4, top_k=2).renormalise
    assert build_router("hash", embed_dim=6, num_experts=4).seed == 0
