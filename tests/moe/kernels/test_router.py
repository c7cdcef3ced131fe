"""The routers' kernels against the same routers in plain PyTorch, with the same random numbers."""

from types import SimpleNamespace

import pytest
import torch

from fairseq_sparsemixer.moe import MoEFeedForward, build_router, load_balance_loss
from fairseq_sparsemixer.moe.kernels import products
from fairseq_sparsemixer.moe.kernels import router as fused_router
from fairseq_sparsemixer.moe.kernels import statistics as fused_statistics

pytestmark = pytest.mark.skipif(
    fused_router.triton is None or torch.cuda.is_available(),
    reason="needs Triton, and is for its interpreter",
)

ROUTERS = [
    ("switch", {}),
    ("switch", {"jitter_eps": 0.0}),
    ("switch-omega", {}),
    ("topk", {}),
    ("sparsemixer-1st", {}),
    ("sparsemixer", {}),
    ("sparsemixer", {"first_order_on_argmax": False, "jitter_eps": 1e9}),
    ("sparsemixer", {"jitter_eps": 1e-6}),
    ("sparsemixer", {"balance_bias_rate": 0.1}),
    ("sparsemixer-cv", {}),
    ("sparsemixer-v2", {}),
    ("sparsemixer-v2-star", {}),
    ("sparsemixer", {"gate": "full"}),
    ("sparsemixer", {"gate": "full", "first_order_on_argmax": False}),
    ("sparsemixer", {"gate": "full", "jitter_eps": 0.0, "balance_bias_rate": 0.1}),
    ("sparsemixer-cv", {"gate": "full"}),
    ("sparsemixer-v2-star", {"gate": "full", "first_order_on_argmax": False}),
    ("composed", {"choice": "argmax", "gate": "masked", "estimator": "grad-1"}),
    ("composed", {"gate": "full", "estimator": "grad-1"}),
    ("composed", {"gate": "one"}),
    ("composed", {"choice": "full-sample", "gate": "one", "first_order_on_argmax": False}),
]


@pytest.fixture
def fused(monkeypatch):
    """A switch: whether tensors of the CPU are served, by programs of few tokens."""
    monkeypatch.setattr(fused_router, "CELLS", 16)
    calls = []
    route = fused_router.route
    monkeypatch.setattr(fused_router, "route", lambda *args: calls.append(1) or route(*args))

    def switch(on):
        monkeypatch.setattr(fused_router, "DEVICES", ("cpu",) if on else ())
        calls.clear()
        return calls

    return switch


def logits(tokens, num_experts, ties):
    """Rows of any size, some below 0 throughout, and rows of equal logits where asked for."""
    z = torch.randn(tokens, num_experts) * torch.rand(tokens, 1) * 4
    z[::5] = -z[::5].abs()
    if ties and tokens > 3:
        z[1], z[2] = 0.0, 2.0
    return z


def route(router, z, mask, weights):
    torch.manual_seed(3)
    z = z.clone().requires_grad_()
    routing = router.route(z, mask)
    parts = [routing.gate, routing.probs, routing.sampling_probs, routing.logits]
    if routing.mean_gate is not None:
        parts.append(routing.mean_gate)
    loss = sum((part * weight[:, : part.shape[1]]).sum() for part, weight in zip(parts, weights))
    (gradient,) = torch.autograd.grad(loss, z)
    drawn_next = torch.rand(3)
    return [routing.expert_index, *parts, gradient, drawn_next]


@pytest.mark.parametrize(("name", "options"), ROUTERS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("tokens", "num_experts", "padded"),
    [(19, 4, False), (9, 5, True), (1, 1, False), (0, 4, False)],
)
def test_same_seed_same_routing(name, options, training, tokens, num_experts, padded, fused):
    torch.manual_seed(0)
    router = build_router(name, embed_dim=6, num_experts=num_experts, **options).train(training)
    if router.balance_bias is not None:
        router.balance_bias.bias.normal_()
    # torch.topk takes any of equal logits, arg-max the first of them.
    ties = name.startswith("sparsemixer") or name == "composed"
    z, weights = logits(tokens, num_experts, ties), torch.randn(5, tokens, num_experts)
    mask = torch.rand(tokens) < 0.4 if padded else None
    assert fused(False) == []
    expected = route(router, z, mask, weights)
    calls = fused(True)
    actual = route(router, z, mask, weights)
    assert calls == [1]
    for value, wanted in zip(actual, expected):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sparsemixer", {"quadrature": "uniform"}),
        ("sparsemixer-v2", {"top_k": 2}),
        ("topk", {"top_k": 2}),
        ("switch", {"balance_bias_rate": 0.1}),
        ("default-moe", {}),
    ],
)
def test_other_routers_stay_as_they_are(name, options, fused):
    router = build_router(name, embed_dim=6, num_experts=4, **options)
    calls = fused(True)
    router.route(torch.randn(5, 4))
    assert calls == []


def test_logits_that_are_no_numbers_choose_an_expert_all_the_same(fused):
    fused(True)
    for name in ("switch", "sparsemixer"):
        routing = build_router(name, embed_dim=6, num_experts=3).route(
            torch.full((4, 3), torch.nan)
        )
        assert routing.gate.isnan().all()
        assert ((routing.expert_index >= 0) & (routing.expert_index < 3)).all()


@pytest.mark.parametrize(
    ("name", "options"), [("switch", {}), ("sparsemixer", {}), ("sparsemixer", {"gate": "full"})]
)
def test_a_fused_layer_compiles_in_one_piece(name, options, monkeypatch):
    # Not by `fused`, whose list of calls torch.compile would have to follow.
    monkeypatch.setattr(fused_router, "CELLS", 16)
    monkeypatch.setattr(fused_router, "DEVICES", ("cpu",))
    torch.manual_seed(0)
    layer = MoEFeedForward(16, 32, 3, router=name, backend="triton", **options).to(torch.bfloat16)
    x = torch.randn(7, 16, dtype=torch.bfloat16)

    def forward(x):
        y, routing = layer(x)
        return y, load_balance_loss(routing)

    def run(function):
        torch.manual_seed(1)
        layer.zero_grad()
        y, loss = function(x)
        (y.float().square().sum() + loss).backward()
        return [y, loss, *(p.grad for p in layer.parameters())]

    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    # As a user may ask: no operator that does not say that it can be compiled.
    with torch._dynamo.config.patch(only_allow_pt2_compliant_ops=True):
        found = run(compiled)
    torch.testing.assert_close(found, run(forward))


@pytest.mark.parametrize("name", ["switch", "sparsemixer"])
@pytest.mark.parametrize(
    ("backend", "expected"),
    [("auto", True), ("triton", True), ("sorted", False), ("loop", False)],
)
def test_the_backend_is_that_of_router_and_statistics_too(
    name, backend, expected, fused, monkeypatch
):
    routed, summed = fused(True), []
    pack = fused_statistics.pack
    monkeypatch.setattr(fused_statistics, "pack", lambda r: summed.append(1) or pack(r))
    layer = MoEFeedForward(4, 6, 3, router=name, backend="loop")
    layer.backend = backend  # as if it had been built with it
    routing = layer.router(torch.randn(5, 4), torch.tensor([False] * 4 + [True]))
    assert load_balance_loss(routing).isfinite()
    assert (len(routed), len(summed)) == (expected, expected)
    with pytest.raises(ValueError, match="unknown backend"):
        layer.backend = "none"


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True)])
def test_older_gpus_get_the_plain_router(capability, expected, monkeypatch):
    """As they get another backend for the experts."""
    logits = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)
    monkeypatch.setattr(products.kernels, "INTERPRETED", False)
    monkeypatch.setattr(products, "capability", lambda device: capability)
    assert fused_router.serves(logits, "auto") == expected
