"""Arguments that routers and layers refuse."""

import math

import pytest
import torch
from support.reference_routers import (
    smallest,
)

from fairseq_sparsemixer.moe import ROUTERS, MoEFeedForward


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("gshard", {"top_k": 1}, "top_k must be 2 for router 'gshard', not 1"),
        ("gshard", {"top_k": 3}, "top_k must be 2 for router 'gshard', not 3"),
        ("noisy-topk", {"top_k": 1}, "top_k must be at least 2 for router 'noisy-topk', not 1"),
        ("topk", {"renormalise": True}, "renormalise needs top_k of at least 2"),
        ("topk", {"jitter_eps": 1.0}, "below 1 for router 'topk'"),
        ("switch-omega", {"jitter_eps": 1.0}, "below 1 for router 'switch-omega'"),
        ("default-moe", {"mean_decay": 1.0}, "mean_decay must be at least 0 and below 1, not 1.0"),
        ("sparsemixer-cv", {"mean_decay": 1.0}, "mean_decay must be at least 0 and below 1"),
        ("sparsemixer-cv", {"mean_decay": -0.1}, "mean_decay must be at least 0 and below 1"),
        ("default-moe", {"mean_decay": math.nan}, "mean_decay must be at least 0 and below 1"),
        ("sparsemixer", {"quadrature": "x"}, "quadrature must be midpoint or uniform, not 'x'"),
        ("sparsemixer-cv", {"quadrature": "x"}, "quadrature must be midpoint or uniform"),
        ("topk", {"balance_bias_rate": -1.0}, "balance_bias_rate must be a number of at least 0"),
        ("topk", {"balance_bias_rate": math.inf}, "balance_bias_rate must be a number"),
        *(
            (name, {"balance_bias_rate": 0.1}, f"'{name}' has no use for a balance_bias_rate")
            for name, router in sorted(ROUTERS.items())
            if not router.takes_balance_bias
        ),
        *(
            (name, {"top_k": 2}, f"top_k must be 1 for router '{name}', not 2")
            for name, router in sorted(ROUTERS.items())
            if router.max_top_k == 1
        ),
    ],
)
def test_bad_router_arguments(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        smallest(name, **arguments)


@pytest.mark.parametrize("value", [1, 1.0, -0.1, 1.5, math.nan])
def test_bad_output_masking(value):
    with pytest.raises(ValueError, match="output_masking must be at least 0 and below 1"):
        MoEFeedForward(4, 8, 2, output_masking=value)


def test_hash_needs_token_ids():
    router = smallest("hash")
    with pytest.raises(ValueError, match="router 'hash' needs token_ids"):
        router(torch.randn(3, 8))
    with pytest.raises(ValueError, match="router 'hash' needs token_ids"):
        router.route(torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"token_ids must be \(3,\), not \(4,\)"):
        MoEFeedForward(4, 8, 2, router="hash")(
            torch.randn(3, 4), token_ids=torch.zeros(4, dtype=torch.long)
        )


def test_an_option_of_another_router_is_a_type_error():
    for name, options in (
        ("sparsemixer-v2", {"omega": True}),
        ("sparsemixer-1st", {"first_order_on_argmax": False}),
        ("switch", {"renormalise": True}),
        ("topk", {"mean_decay": 0.9}),
    ):
        with pytest.raises(TypeError):
            smallest(name, **options)


SAMPLING = sorted(name for name in ROUTERS if name.startswith("sparsemixer"))


@pytest.mark.parametrize("name", SAMPLING)
@pytest.mark.parametrize("jitter_eps", [0.0, 1e-9])
def test_sparsemixer_needs_a_choice(name, jitter_eps):
    """Without one the gate is 1, and the router has no gradient."""
    with pytest.raises(ValueError, match=f"jitter_eps must be at least 1e-06 for router '{name}'"):
        smallest(name, jitter_eps=jitter_eps)
    smallest(name, num_experts=1, jitter_eps=jitter_eps)  # nothing to learn


LEARNING = sorted(ROUTERS.keys() - {"hash", "language", "random"})
EXTREMES = [{}, {"jitter_eps": 0.0}, {"jitter_eps": 1e-6}, {"jitter_eps": 1e9}]
EXTREMES += [{"init_scale": 0.0}, {"bias": False}, {"init_scale": 0.0, "bias": False}]


@pytest.mark.parametrize("name", LEARNING)
@pytest.mark.parametrize("options", EXTREMES)
@pytest.mark.parametrize("all_experts", [False, True])
def test_what_a_router_accepts_trains_it(name, options, all_experts):
    torch.manual_seed(0)
    kind = ROUTERS[name]
    top_k = max(1, kind.min_top_k)
    if all_experts:
        if kind.max_top_k is not None:
            return
        top_k = 4
    try:
        layer = MoEFeedForward(6, 8, 4, router=name, top_k=top_k, **options)
    except ValueError:
        return
    if options.get("jitter_eps") == 1e-6:
        # So near to each other that the mask leaves a choice.
        with torch.no_grad():
            layer.router.weight.mul_(1e-8)
            layer.router.bias.fill_(1.0)
    layer(torch.randn(50, 6))[0].square().sum().backward()
    assert layer.router.weight.grad.abs().max() > 0
