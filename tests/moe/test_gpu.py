"""What only a GPU can show: dtypes, no waiting, CUDA graphs and compiled layers."""

import pytest
import torch
from support.float64 import assert_as_exact_as_its_yardstick
from support.reference import assert_all_close

from fairseq_sparsemixer.moe import (
    ROUTERS,
    MoEFeedForward,
    RoutingStatistics,
    load_balance_loss,
    z_loss,
)
from fairseq_sparsemixer.moe.dispatch import OBSTACLES, backend_for
from fairseq_sparsemixer.moe.kernels import router as fused_router

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
ROUTER_NAMES = sorted(name for name in ROUTERS if not ROUTERS[name].needs_token_ids)
ONE_EXPERT = ["sparsemixer", "sparsemixer-1st", "sparsemixer-v2", "switch", "switch-omega"]


def make_layer(backend, dtype=torch.bfloat16, router="sparsemixer", num_experts=5, **options):
    obstacle = OBSTACLES[backend](CUDA, dtype) if backend in OBSTACLES else None
    if obstacle is not None:
        pytest.skip(f"backend {backend!r} {obstacle}")
    torch.manual_seed(0)
    sizes = options.pop("sizes", (64, 96))
    options.setdefault("top_k", ROUTERS[router].min_top_k)
    return MoEFeedForward(*sizes, num_experts, router=router, backend=backend, **options).to(
        CUDA, dtype
    )


def make_batch(tokens=300, dtype=torch.bfloat16, embed_dim=64):
    torch.manual_seed(1)
    x = torch.randn(tokens, embed_dim, device=CUDA, dtype=dtype)
    return x, torch.arange(tokens, device=CUDA) % 7 == 3


def step(layer, x, mask):
    """Forward and backward with all that training reads; gradients are left in the parameters."""
    y, routing = layer(x, mask)
    packed = RoutingStatistics.from_routing(routing).pack()
    loss = y.float().square().sum() + load_balance_loss(routing) + z_loss(routing)
    loss.backward()
    return y, packed


def results(layer, x, mask):
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    torch.manual_seed(2)
    y, packed = step(layer, leaf, mask)
    return {
        "y": y.detach(),
        "packed": packed.detach(),
        "x": leaf.grad,
        **{name: p.grad.clone() for name, p in layer.named_parameters()},
    }


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "options"),
    [
        (300, {}),
        (3000, {"sizes": (512, 2048), "num_experts": 8}),
        (300, {"router": "topk", "top_k": 3}),
        (300, {"activation_fn": "gelu"}),
        (300, {"recompute": True}),
        (300, {"sizes": (18, 22)}),
        (300, {"num_experts": 1}),
    ],
)
def test_all_dtypes_are_as_exact_as_their_yardstick(backend, dtype, tokens, options):
    layer = make_layer(backend, dtype, **options)
    assert_as_exact_as_its_yardstick(layer, *make_batch(tokens, dtype, layer.embed_dim), backend)


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 0])
def test_a_token_or_none_equals_the_loop(backend, dtype, tokens):
    x, mask = make_batch(tokens, dtype)
    actual = results(make_layer(backend, dtype), x, mask)
    assert_all_close(actual, results(make_layer("loop", dtype), x, mask), TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_router_learns_as_by_the_loop(backend, dtype):
    """Its gradient is that of a gate: a sum over outputs, none of which is near a ReLU's zero."""
    x, mask = make_batch(3000, dtype)
    actual = results(make_layer(backend, dtype), x, mask)
    expected = results(make_layer("loop", dtype), x, mask)
    names = [name for name in expected if "router" in name or name in ("y", "packed")]
    actual, expected = ({name: each[name] for name in names} for each in (actual, expected))
    assert_all_close(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_is_honoured(allowed):
    layer = make_layer("triton", torch.float32, router="hash")
    x, _ = make_batch(dtype=torch.float32)
    ids = torch.arange(len(x), device=CUDA)
    layer(x, None, ids)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        y, _ = layer(x, None, ids)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    layer.backend = "sorted"
    exact, _ = layer.double()(x.double(), None, ids)
    error = (y - exact).abs().max().item()
    assert 1e-5 < error < 1e-2 if allowed else error < 1e-5


@pytest.mark.parametrize(
    ("router", "options"),
    [
        *((name, {}) for name in ONE_EXPERT),
        ("sparsemixer", {"gate": "full"}),
        ("sparsemixer-v2-star", {"gate": "full"}),
        ("composed", {"choice": "full-sample", "gate": "one"}),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_fused_routers_equal_the_plain_ones(router, options, training, monkeypatch):
    layer = make_layer("triton", torch.float32, router, **options).train(training)
    batch = make_batch(dtype=torch.float32)
    fused = results(layer, *batch)
    monkeypatch.setattr(fused_router, "DEVICES", ())
    assert_all_close(fused, results(layer, *batch), 1e-5)


@pytest.mark.parametrize("router", ROUTER_NAMES)
@pytest.mark.parametrize("padded", [False, True])
def test_fused_statistics_equal_the_plain_ones(router, padded, monkeypatch):
    layer, (x, mask) = make_layer("auto", torch.float32, router), make_batch(5000, torch.float32)
    torch.manual_seed(2)
    routing = layer.router(x, mask if padded else None)

    def sums_and_gradient():
        sums = RoutingStatistics.from_routing(routing)
        packed, loss = sums.pack(), load_balance_loss(routing) + z_loss(routing)
        loss = loss + sums.importance_loss + (packed * torch.arange(23, device=CUDA)).sum() / 5000
        if not loss.requires_grad:
            return {"packed": packed}
        leaf = layer.router.weight
        return {"packed": packed, "d": torch.autograd.grad(loss, leaf, retain_graph=True)[0]}

    fused = sums_and_gradient()
    assert torch.equal(fused["packed"], sums_and_gradient()["packed"])
    monkeypatch.setattr(fused_router, "DEVICES", ())
    assert_all_close(fused, sums_and_gradient(), 1e-4)


@pytest.mark.parametrize("router", ONE_EXPERT)
def test_logits_that_are_no_numbers_choose_an_expert_all_the_same(router):
    layer = make_layer("triton", router=router)
    y, routing = layer(torch.full((9, 64), torch.nan, device=CUDA, dtype=torch.bfloat16))
    assert ((routing.expert_index >= 0) & (routing.expert_index < 5)).all()
    assert y.isnan().all()


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("router", ROUTER_NAMES)
def test_nothing_waits_for_the_device(backend, router):
    layer, (x, mask) = make_layer(backend, router=router, activation_dropout=0.1), make_batch()
    step(layer, x.requires_grad_(), mask)  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(layer, x, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("options", [{}, {"activation_dropout": 0.3, "activation_fn": "gelu"}])
def test_a_captured_step_is_the_step(backend, options):
    """Replayed on another batch: its experts get other numbers of tokens than were captured."""
    layer = make_layer(backend, **options).eval()
    (x, mask), other = make_batch(), make_batch()[0].flip(0) * 2
    static_x = x.clone().requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(layer, static_x, mask)
            layer.zero_grad(set_to_none=True)
            static_x.grad = None
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, packed = step(layer, static_x, mask)
    with torch.no_grad():
        static_x.copy_(other)
    graph.replay()
    replayed = {
        "y": y.detach().clone(),
        "packed": packed.detach().clone(),
        "x": static_x.grad.clone(),
        **{name: p.grad.clone() for name, p in layer.named_parameters()},
    }
    assert_all_close(replayed, results(layer, other, mask), 1e-3)


@pytest.mark.parametrize("backend", ["triton"])
def test_a_captured_step_draws_new_random_numbers(backend):
    layer = make_layer(backend, activation_dropout=0.5)
    x, mask = make_batch()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        layer(x, mask)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        y, routing = layer(x, mask)
    graph.replay()
    first = y.clone(), routing.expert_index.clone()
    graph.replay()
    assert not torch.equal(first[0], y)
    assert not torch.equal(first[1], routing.expert_index)


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("router", ["sparsemixer", "switch", "gshard"])
def test_compiles_in_one_piece(backend, router):
    layer, (x, mask) = make_layer(backend, router=router).eval(), make_batch()
    expected = results(layer, x, mask)

    @torch.compile(fullgraph=True)
    def forward(x, mask):
        y, routing = layer(x, mask)
        packed = RoutingStatistics.from_routing(routing).pack()
        return y, packed, load_balance_loss(routing) + z_loss(routing)

    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    y, packed, losses = forward(leaf, mask)
    (y.float().square().sum() + losses).backward()
    actual = {
        "y": y.detach(),
        "packed": packed.detach(),
        "x": leaf.grad,
        **{name: p.grad for name, p in layer.named_parameters()},
    }
    assert_all_close(actual, expected, 3e-2)


def test_same_input_same_bits():
    layer, batch = make_layer("triton", router="topk", top_k=2), make_batch()
    first, second = results(layer, *batch), results(layer, *batch)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_takes_a_backend_that_serves(dtype):
    name = backend_for(CUDA, dtype)
    assert name == "sorted" or OBSTACLES[name](CUDA, dtype) is None
    layer = make_layer("auto", dtype)
    y, _ = layer(*make_batch(dtype=dtype))
    assert y.isfinite().all()
