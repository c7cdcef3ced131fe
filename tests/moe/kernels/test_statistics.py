"""The kernels that sum routing statistics against the same sums in plain PyTorch."""

import dataclasses
import math

import pytest
import torch

from fairseq_sparsemixer.moe import (
    ROUTERS,
    RoutingStatistics,
    build_router,
    load_balance_loss,
    z_loss,
)
from fairseq_sparsemixer.moe.kernels import router as fused_router
from fairseq_sparsemixer.moe.kernels import statistics as fused_statistics
from fairseq_sparsemixer.moe.routing import Routing

pytestmark = pytest.mark.skipif(
    fused_router.triton is None or torch.cuda.is_available(),
    reason="needs Triton, and is for its interpreter",
)

LEAVES = ("logits", "probs", "sampling_probs", "load")
OUTPUTS = [field.name for field in dataclasses.fields(RoutingStatistics)]


@pytest.fixture
def fused(monkeypatch):
    """A switch: whether tensors of the CPU are served, by programs of few tokens."""
    monkeypatch.setattr(fused_router, "CELLS", 128)
    calls = []
    pack = fused_statistics.pack
    monkeypatch.setattr(fused_statistics, "pack", lambda r: calls.append(1) or pack(r))

    def switch(on):
        monkeypatch.setattr(fused_router, "DEVICES", ("cpu",) if on else ())
        calls.clear()
        return calls

    return switch


def routing_of(
    tokens, num_experts, top_k=1, padded=False, masked=False, with_load=False, num_chosen=None
):
    """What no router returns at once: each part may be there or not, none follows from another."""
    torch.manual_seed(tokens + num_experts + top_k)
    z, p, p_masked, load = torch.rand(4, tokens, num_experts).mul(3).unbind()
    probs = p.requires_grad_()
    return Routing(
        expert_index=torch.randint(-1, num_experts, (tokens, top_k)),
        gate=torch.rand(tokens, top_k),
        logits=(z * 4 - 6).requires_grad_(),
        probs=probs,
        sampling_probs=p_masked.requires_grad_() if masked else probs,
        padding_mask=torch.rand(tokens) < 0.4 if padded else None,
        num_chosen=num_chosen,
        load=load.requires_grad_() if with_load else None,
    )


def values_and_gradients(routing):
    """Each sum, and of each sum alone the gradients of all that it may come from."""
    sums = RoutingStatistics.from_routing(routing)
    found = {"packed": sums.pack()}
    leaves = {name: getattr(routing, name) for name in LEAVES if getattr(routing, name) is not None}
    for output in OUTPUTS:
        value = getattr(sums, output)
        found[output] = value
        if not value.requires_grad:
            continue
        weighted = (value * torch.arange(1.0, value.numel() + 1).view(value.shape)).sum()
        gradients = torch.autograd.grad(
            weighted, list(leaves.values()), allow_unused=True, retain_graph=True
        )
        for name, gradient in zip(leaves, gradients):
            zeros = torch.zeros_like(leaves[name])
            found[f"{name} from {output}"] = zeros if gradient is None else gradient
    return found


def assert_the_same(routing, fused):
    assert fused(False) == []
    expected = values_and_gradients(routing)
    calls = fused(True)
    actual = values_and_gradients(routing)
    assert calls == [1]
    assert actual.keys() == expected.keys()  # the same sums have a gradient
    for name, value in actual.items():
        torch.testing.assert_close(
            value,
            expected[name],
            rtol=1e-5,
            atol=1e-5,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("on", [False, True])
def test_packed_sums_are_the_parts_in_one_tensor(on, fused):
    """Whatever comes from above, no gradient flows back of counts and entropy."""
    routing = routing_of(9, 5, 3, True, True, True)
    leaves = [getattr(routing, name) for name in LEAVES]
    weight = torch.randn(3 + 4 * 5)
    calls = fused(on)
    found = []
    for packed in (
        RoutingStatistics.packed(routing),
        RoutingStatistics.from_routing(routing).pack(),
    ):
        found.append([packed, *torch.autograd.grad(packed, leaves, weight)])
    assert len(calls) == 2 * on
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("tokens", [0, 1, 37])
@pytest.mark.parametrize("num_experts", [1, 3, 8, 13])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_sums_and_gradients_of_all_sizes(tokens, num_experts, top_k, fused):
    assert_the_same(routing_of(tokens, num_experts, top_k, True, True, True), fused)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("with_load", [False, True])
@pytest.mark.parametrize("num_chosen", [None, 2])
def test_parts_that_may_be_missing(padded, masked, with_load, num_chosen, fused):
    assert_the_same(routing_of(9, 5, 3, padded, masked, with_load, num_chosen), fused)


def test_any_strides(fused):
    routing = routing_of(9, 5, 3, padded=True)
    wide = {name: getattr(routing, name).detach() for name in ("logits", "probs", "expert_index")}
    wide = {name: value.t().contiguous().t() for name, value in wide.items()}
    wide["padding_mask"] = routing.padding_mask.repeat_interleave(2)[::2]
    assert not any(value.is_contiguous() for value in wide.values())
    wide["logits"].requires_grad_()
    routing = dataclasses.replace(routing, sampling_probs=wide["probs"].requires_grad_(), **wide)
    assert_the_same(routing, fused)


def with_row(logits, probs, padding):
    routing = routing_of(3, 2)
    with torch.no_grad():
        routing.logits[1], routing.probs[1] = torch.tensor(logits), torch.tensor(probs)
    routing.padding_mask = torch.tensor([False, True, False]) if padding else None
    return routing


@pytest.mark.parametrize("padding", [False, True])
def test_a_logit_of_minus_infinity(padding, fused):
    """Its entropy is not a number, with p 0 too: that is for routers to avoid."""
    for probs in ([0.0, 1.0], [0.5, 0.5]):
        assert_the_same(with_row([-math.inf, 1.0], probs, padding), fused)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("top", [-math.inf, math.inf, math.nan])
def test_sums_that_are_not_finite(top, padding, fused):
    routing = with_row([-math.inf, top], [0.5, 0.5], padding)
    fused(False)
    expected = RoutingStatistics.from_routing(routing).pack()
    fused(True)
    actual = RoutingStatistics.from_routing(routing).pack()
    assert not actual.isfinite().all()
    torch.testing.assert_close(actual, expected, equal_nan=True)


def test_same_routing_same_bits(fused):
    fused(True)
    routing = routing_of(37, 8, 2, True, True)
    first, second = values_and_gradients(routing), values_and_gradients(routing)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("name", "compiled"),
    [
        ("switch", False),
        ("straight-through", False),
        ("sparsemixer", True),
        ("noisy-topk", True),
    ],
)
def test_statistics_of_a_router(name, compiled, fused):
    """Compiled in one piece too; router's and statistics' kernels one after the other."""
    torch.manual_seed(0)
    router = build_router(name, embed_dim=8, num_experts=3, top_k=ROUTERS[name].min_top_k)
    x, mask = torch.randn(7, 8), torch.arange(7) > 4

    def forward(x):
        routing = router(x, mask)
        sums = RoutingStatistics.from_routing(routing)
        losses = load_balance_loss(routing) + z_loss(routing) + sums.importance_loss
        return routing.gate, sums.pack(), losses

    def run(function):
        torch.manual_seed(1)
        router.zero_grad()
        leaf = x.clone().requires_grad_()
        gate, packed, losses = function(leaf)
        (gate.square().sum() + packed.square().sum() + losses).backward()
        return [gate, packed, losses, leaf.grad, *(p.grad for p in router.parameters())]

    calls = fused(False)
    expected = run(forward)
    assert calls == []
    calls = fused(True)
    if compiled:
        forward = torch.compile(forward, backend="aot_eager", fullgraph=True)
    actual = run(forward)
    assert calls == [1, 1, 1]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
