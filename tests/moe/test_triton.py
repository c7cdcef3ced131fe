"""The backend "triton": what it computes, and that it never waits for a device.

Kernels run in Triton's interpreter. What only a GPU can show is in test_gpu.py.
"""

import os
import subprocess
import sys

import pytest
import torch
from support.float64 import assert_as_exact_as_its_yardstick
from support.reference import assert_all_close
from support.reference_routers import ids
from torch._subclasses.fake_tensor import FakeTensorMode

from fairseq_sparsemixer.moe import (
    ROUTERS,
    MoEFeedForward,
    Routing,
    RoutingStatistics,
    load_balance_loss,
    z_loss,
)
from fairseq_sparsemixer.moe.adaptation import ExpertMeans
from fairseq_sparsemixer.moe.dispatch import BACKENDS as BACKENDS_BY_NAME
from fairseq_sparsemixer.moe.dispatch import OBSTACLES, backend_for, dispatch
from fairseq_sparsemixer.moe.experts import Experts
from fairseq_sparsemixer.moe.kernels import products
from fairseq_sparsemixer.moe.kernels.sorting import sort_slots

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32


def usable(name):
    reason = OBSTACLES[name](CPU, FLOAT) if not torch.cuda.is_available() else "are for the CPU"
    return pytest.param(
        name, marks=pytest.mark.skipif(reason is not None, reason=f"backend {name!r} {reason}")
    )


BACKENDS = [usable("triton")]
needs_triton = pytest.mark.skipif(products.triton is None, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles in each direction although everything is small: the interpreter is slow."""
    monkeypatch.setattr(products, "BLOCK", 16)


@pytest.fixture
def nan_memory():
    """What is allocated and not written is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def random_routing(tokens, num_experts, top_k=1, padding=0.0, one_expert=False):
    index = torch.rand(tokens, num_experts).argsort(-1)[:, :top_k]
    if one_expert:
        index = torch.arange(top_k).expand(tokens, top_k).clone()
    index[torch.rand(tokens) < padding] = -1
    index[torch.rand(tokens, top_k) < padding / 2] = -1
    gate = torch.rand(tokens, top_k).masked_fill(index < 0, 0.0).requires_grad_()
    probs = torch.rand(tokens, num_experts)
    return Routing(index, gate, probs, probs, probs)


def outputs_and_gradients(backend, routing, experts, x, scale, weight):
    y = dispatch(x, routing, experts, backend, None, scale)
    leaves = {"x": x, "gate": routing.gate, **dict(experts.named_parameters())}
    if scale is not None:
        leaves["omega"] = scale
    gradients = torch.autograd.grad(y, list(leaves.values()), weight)
    return {"y": y.detach(), **dict(zip(leaves, gradients))}


CASES = {
    "mixed": {"tokens": 37, "num_experts": 3, "padding": 0.3},
    "many experts": {"tokens": 24, "num_experts": 9, "padding": 0.1},
    "one expert of three": {"tokens": 37, "num_experts": 3, "one_expert": True},
    "the only expert": {"tokens": 19, "num_experts": 1, "padding": 0.2},
    "one token": {"tokens": 1, "num_experts": 3},
    "no token": {"tokens": 0, "num_experts": 3},
    "all padding": {"tokens": 5, "num_experts": 3, "padding": 1.0},
    "two of five": {"tokens": 20, "num_experts": 5, "top_k": 2, "padding": 0.2},
    "three of three": {"tokens": 9, "num_experts": 3, "top_k": 3},
    "gelu": {"tokens": 20, "num_experts": 3, "padding": 0.2, "activation_fn": "gelu"},
    "linear": {"tokens": 9, "num_experts": 2, "activation_fn": "linear"},
    "no omega": {"tokens": 9, "num_experts": 2, "omega": False},
    "multiples of 16": {"tokens": 32, "num_experts": 2, "embed_dim": 32, "ffn_dim": 48},
}
PRECISE = [(name, FLOAT) for name in CASES]
ROUGH = [(name, dtype) for name in ("two of five", "gelu") for dtype in (HALF, BFLOAT)]
TOLERANCE = {FLOAT: 2e-6, HALF: 4e-3, BFLOAT: 3e-2}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("case", "dtype"), PRECISE + ROUGH)
def test_outputs_and_gradients_are_those_of_the_loop(backend, case, dtype, nan_memory):
    torch.manual_seed(1)
    options = dict(CASES[case])
    embed_dim, ffn_dim = options.pop("embed_dim", 18), options.pop("ffn_dim", 22)
    activation_fn, omega = options.pop("activation_fn", "relu"), options.pop("omega", True)
    routing = random_routing(**options)
    experts = Experts(embed_dim, ffn_dim, options["num_experts"], activation_fn).to(dtype)
    tokens = options["tokens"]
    x = torch.randn(tokens, embed_dim, dtype=dtype)
    weight = torch.randn(tokens, embed_dim, dtype=dtype)
    scale = torch.randn(embed_dim, dtype=dtype).requires_grad_() if omega else None
    expected = outputs_and_gradients(
        "loop", routing, experts, x.clone().requires_grad_(), scale, weight
    )
    # What stands in rows of padding must not matter at all.
    x[(routing.expert_index < 0).all(-1)] = float("nan")
    actual = outputs_and_gradients(backend, routing, experts, x.requires_grad_(), scale, weight)
    assert_all_close(actual, expected, TOLERANCE[dtype])


@pytest.mark.skipif(products.TensorDescriptor is None, reason="Triton before 3.4 has none")
@pytest.mark.parametrize("backend", [usable("triton")])
@pytest.mark.parametrize("dtype", [HALF, BFLOAT])
@pytest.mark.parametrize("case", ["mixed", "two of five", "gelu", "one expert of three"])
def test_described_tiles_are_those_of_pointers(backend, case, dtype, nan_memory, monkeypatch):
    """As on a GPU with an engine that copies tiles, which fetches rows of the next expert too."""
    described = []
    descriptor = products.TensorDescriptor
    monkeypatch.setattr(products, "LEAST_DESCRIBED_SLOTS", 0)
    monkeypatch.setattr(
        products, "TensorDescriptor", lambda *args: described.append(1) or descriptor(*args)
    )
    torch.manual_seed(1)
    options = dict(CASES[case])
    activation_fn = options.pop("activation_fn", "relu")
    routing = random_routing(**options)
    experts = Experts(24, 40, options["num_experts"], activation_fn).to(dtype)
    x = torch.randn(options["tokens"], 24, dtype=dtype)
    x[(routing.expert_index < 0).all(-1)] = float("nan")
    weight = torch.randn(options["tokens"], 24, dtype=dtype)
    results = []
    for has_engine in (False, True):
        monkeypatch.setattr(products, "describable", lambda device, answer=has_engine: answer)
        leaf = x.clone().requires_grad_()
        results.append(outputs_and_gradients(backend, routing, experts, leaf, None, weight))
    assert len(described) == 12  # two matrices for each of four products and two gradients
    assert_all_close(*results, TOLERANCE[dtype])
    # Rows of weights that lie anywhere, as a part of what a wrapper keeps in one piece.
    flat = torch.cat([torch.zeros(1, dtype=dtype), experts.w1.detach().flatten()])
    del experts.w1
    experts.w1 = flat[1:].view(options["num_experts"], 40, 24).requires_grad_()
    leaf = x.clone().requires_grad_()
    dispatch(leaf, routing, experts, backend)
    assert len(described) == 14


@pytest.mark.parametrize("activation_fn", ["relu", "gelu"])
@pytest.mark.parametrize("dtype", [FLOAT, HALF, BFLOAT])
@pytest.mark.parametrize("backend", ["sorted"])
def test_as_exact_as_its_yardstick(backend, dtype, activation_fn):
    torch.manual_seed(0)
    layer = MoEFeedForward(64, 96, 5, activation_fn=activation_fn).to(dtype)
    x, mask = torch.randn(300, 64).to(dtype), torch.arange(300) % 7 == 3
    assert_as_exact_as_its_yardstick(layer, x, mask, backend)


def test_a_backend_that_is_off_fails_beside_its_yardstick(monkeypatch):
    right = BACKENDS_BY_NAME["sorted"]
    monkeypatch.setitem(BACKENDS_BY_NAME, "sorted", lambda *parts: right(*parts) * 1.005)
    torch.manual_seed(0)
    layer, x = MoEFeedForward(64, 96, 5).to(BFLOAT), torch.randn(300, 64).to(BFLOAT)
    with pytest.raises(AssertionError):
        assert_as_exact_as_its_yardstick(layer, x, None, "sorted")


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    """x and the gradient of y as they come: transposed, or one number for all."""
    torch.manual_seed(0)
    experts, routing = Experts(6, 10, 3), random_routing(8, 3)
    x = torch.randn(6, 8).t().requires_grad_()
    weight = torch.ones(1, 1).expand(8, 6)
    assert not x.is_contiguous()
    actual, expected = (
        outputs_and_gradients(name, routing, experts, x, None, weight) for name in (backend, "loop")
    )
    assert_all_close(actual, expected, 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation_fn", ["relu", "gelu"])
@pytest.mark.parametrize("recompute", [False, True])
def test_backward_goes_through_the_dropout_of_the_forward(backend, activation_fn, recompute):
    """The slope in a random direction of all inputs, with the same mask at all points."""
    torch.manual_seed(0)
    layer = Experts(6, 10, 2)
    routing = random_routing(12, 2, top_k=2, padding=0.1)
    x, scale = torch.randn(12, 6), torch.randn(6)
    leaves = [x, scale, routing.gate.data, *(p.data for p in layer.parameters())]
    directions = [torch.randn_like(leaf) for leaf in leaves]
    weight = torch.randn(12, 6)

    def loss(step):
        moved = [leaf + step * way for leaf, way in zip(leaves, directions)]
        moved = [leaf.requires_grad_() for leaf in moved]
        experts = Experts(6, 10, 2, activation_fn, 0.4, recompute)
        for name, value in zip(("w1", "b1", "w2", "b2"), moved[3:]):
            delattr(experts, name)
            setattr(experts, name, value)
        torch.manual_seed(5)
        there = Routing(routing.expert_index, moved[2], *(3 * [routing.probs]))
        y = dispatch(moved[0], there, experts, backend, None, moved[1])
        return (y * weight).sum(), moved

    value, moved = loss(0.0)
    gradients = torch.autograd.grad(value, moved)
    slope = sum((g * way).sum() for g, way in zip(gradients, directions))
    step = 1e-3
    measured = (loss(step)[0] - loss(-step)[0]) / (2 * step)
    assert slope.item() == pytest.approx(measured.item(), rel=0.01)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation_fn", ["relu", "gelu"])
def test_recomputing_changes_nothing(backend, activation_fn):
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        experts, routing = Experts(6, 10, 3, activation_fn, 0.5, recompute), random_routing(9, 3)
        x, weight = torch.randn(9, 6).requires_grad_(), torch.randn(9, 6)
        torch.manual_seed(1)
        results.append(outputs_and_gradients(backend, routing, experts, x, None, weight))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recompute", [False, True])
def test_recomputing_keeps_no_inner_layer(backend, recompute):
    experts, routing = Experts(6, 10, 3, "relu", 0.0, recompute), random_routing(9, 3)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        dispatch(torch.randn(9, 6), routing, experts, backend)
    assert kept
    assert ((9, 10) in kept) == (not recompute)


@pytest.mark.parametrize("backend", [usable("triton")])
def test_dropout_leaves_its_share_and_scales_it_up(backend):
    torch.manual_seed(0)
    expert = torch.tensor(40 * [0] + 20 * [1] + 4 * [-1])
    a, w, bias = torch.rand(len(expert), 8), torch.rand(2, 64, 8), torch.rand(2, 64)
    *_, tiles = sort_slots(expert, 2, 16)

    def product(seed, kept_share=0.3):
        return products.sorted_product(
            a, w, False, bias, seed, None, tiles, 16, kept_share, True, False
        )[0]

    whole = product(None)
    dropped = product(torch.tensor([7]))
    kept = dropped > 0
    assert kept[:60].float().mean().item() == pytest.approx(0.3, abs=0.02)
    torch.testing.assert_close(dropped[kept], whole[kept] / 0.3)
    assert (dropped[60:] == 0).all()
    assert torch.equal(dropped, product(torch.tensor([7])))
    assert not torch.equal(dropped, product(torch.tensor([8])))
    assert (product(torch.tensor([7]), kept_share=0.0) == 0).all()


@pytest.mark.parametrize("backend", [usable("triton")])
def test_dropout_draws_for_each_unit_of_each_slot(backend):
    """No two units are dropped together under 20 seeds, wherever they lie in two by two tiles."""
    expert = torch.tensor(3 * [0] + 4 * [1])
    a, w = torch.ones(7, 1), torch.ones(2, 20, 1)
    *_, tiles = sort_slots(expert, 2, 16)
    kept = [
        products.sorted_product(
            a, w, False, None, torch.tensor([seed]), None, tiles, 16, 0.5, True, False
        )[0]
        for seed in range(20)
    ]
    units = torch.stack(kept).gt(0).flatten(1).t().tolist()
    assert len({tuple(unit) for unit in units}) == 7 * 20


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prediction", ["mean", "linear"])
def test_running_means_are_those_of_the_loop(backend, prediction, nan_memory):
    torch.manual_seed(0)
    x, mask = torch.randn(20, 6), torch.rand(20) < 0.3
    sums = []
    for name in (backend, "loop"):
        torch.manual_seed(1)
        layer = MoEFeedForward(
            6, 10, 3, router="sparsemixer-cv", prediction=prediction, backend=name
        )
        layer(x, mask)
        sums.append(layer.router.expert_means.sums())
    torch.testing.assert_close(*sums)


@pytest.mark.parametrize("backend", [*BACKENDS, "sorted"])
@pytest.mark.parametrize("tokens", [1, 9])
def test_who_calls_a_backend_may_observe_without_a_gradient(backend, tokens):
    torch.manual_seed(0)
    experts, routing, x = Experts(6, 10, 3), random_routing(tokens, 3), torch.randn(tokens, 6)
    sums = []
    for name in (backend, "loop"):
        means = ExpertMeans(3, 6, 0.9)
        with torch.no_grad():
            dispatch(x, routing, experts, name, means.observe)
        sums.append(means.sums())
    assert sums[0][0].sum() == tokens
    torch.testing.assert_close(*sums)


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_without_gradients(backend):
    torch.manual_seed(0)
    layer = MoEFeedForward(6, 10, 3, backend=backend, activation_dropout=0.5).eval()
    x = torch.randn(9, 6)
    with_gradient, _ = layer(x)
    with torch.inference_mode():
        assert torch.equal(layer(x)[0], with_gradient)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    torch.manual_seed(0)
    layer = MoEFeedForward(32, 64, 4, backend=backend).eval()
    x = torch.randn(20, 32)
    with torch.autocast("cpu", dtype=BFLOAT):
        y, _ = layer(x)
    assert y.dtype == FLOAT
    torch.testing.assert_close(y, layer(x)[0], rtol=0.02, atol=0.02)
    y.sum().backward()
    assert all(p.grad.dtype == FLOAT for p in layer.experts.parameters())


# --- which backend ---


def test_auto_on_a_gpu(monkeypatch):
    monkeypatch.setattr(products, "kernels", type("Kernels", (), {"INTERPRETED": False}))
    monkeypatch.setattr(products, "triton", object())

    def chosen(capability, dtype):
        monkeypatch.setattr(products, "capability", lambda device: capability)
        return backend_for(CUDA, dtype)

    assert {chosen(c, d) for c in ((8, 0), (9, 0)) for d in (HALF, BFLOAT, FLOAT)} == {"triton"}
    assert chosen((7, 0), HALF) == "sorted"
    assert chosen((9, 0), torch.float64) == "sorted"
    assert backend_for(CPU, FLOAT) == "sorted"
    monkeypatch.setattr(products, "triton", None)
    assert chosen((9, 0), BFLOAT) == "sorted"


def test_what_a_backend_cannot_serve_is_refused(monkeypatch):
    x = torch.randn(3, 6)

    def message(backend, dtype=FLOAT):
        layer = MoEFeedForward(6, 10, 2, backend=backend).to(dtype)
        with pytest.raises(ValueError, match=f"backend '{backend}' .*: choose 'auto'") as error:
            layer(x.to(dtype))
        return str(error.value)

    assert "takes bfloat16, float16 or float32, not torch.float64" in message(
        "triton", torch.float64
    )
    monkeypatch.setattr(products, "triton", None)
    assert "needs Triton (pip install" in message("triton")


@needs_triton
def test_triton_needs_a_gpu_unless_it_is_interpreted():
    code = (
        "import torch; from fairseq_sparsemixer.moe import MoEFeedForward\n"
        "MoEFeedForward(6, 10, 2)(torch.randn(3, 6))\n"
        "MoEFeedForward(6, 10, 2, backend='triton')(torch.randn(3, 6))"
    )
    result = run_compiled(code)
    assert "ValueError: backend 'triton' needs a GPU, not torch.float32 on cpu" in result.stderr


def test_without_triton_all_else_works():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from fairseq_sparsemixer.moe import MoEFeedForward\n"
        "y, _ = MoEFeedForward(6, 10, 2)(torch.randn(3, 6)); print(tuple(y.shape))"
    )
    result = run_compiled(code)
    assert result.stdout.strip() == "(3, 6)", result.stderr


def run_compiled(code):
    """Run Python where Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )


def test_tf32_is_allowed_as_for_other_products():
    assert products._precision(FLOAT) == "ieee"
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert [products._precision(dtype) for dtype in (FLOAT, HALF)] == ["tf32", "ieee"]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


# --- no waiting for the device ---


def layer_with(router, backend, **options):
    top_k = ROUTERS[router].min_top_k
    return MoEFeedForward(16, 32, 4, router=router, top_k=top_k, backend=backend, **options)


def run_layer(layer, state, x, mask, **more):
    """(T, D) output and everything that training reads beside it."""
    y, routing = torch.func.functional_call(layer, state, (x, mask), more)
    losses = load_balance_loss(routing) + z_loss(routing)
    return y, RoutingStatistics.from_routing(routing).pack(), losses


@pytest.mark.parametrize("router", sorted(ROUTERS))
@pytest.mark.parametrize("padded", [False, True])
def test_no_router_waits_for_the_device(router, padded, monkeypatch):
    """Tensors without values: whatever asks for one, or for a size that depends on one, fails."""

    def copied_from_the_host(*args, **kwargs):
        raise AssertionError("a number that is copied to the device waits for it: use new_full")

    monkeypatch.setattr(torch, "tensor", copied_from_the_host)
    monkeypatch.setattr(torch.Tensor, "new_tensor", copied_from_the_host)
    layer = layer_with(router, "triton", activation_dropout=0.1, output_masking=0.1).to(BFLOAT)
    with FakeTensorMode() as mode:
        state = {name: mode.from_tensor(v) for name, v in layer.state_dict(keep_vars=True).items()}
        x = torch.randn(9, 16, dtype=BFLOAT, requires_grad=True)
        mask = torch.zeros(9, dtype=torch.bool) if padded else None
        y, packed, losses = run_layer(layer, state, x, mask, **ids(router, torch.arange(9)))
        leaves = [x, *(value for value in state.values() if value.requires_grad)]
        assert len(leaves) == 1 + len(list(layer.parameters()))
        loss = y.float().sum() + packed.sum() + losses
        gradients = torch.autograd.grad(loss, leaves)
        assert [g.shape for g in gradients] == [leaf.shape for leaf in leaves]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation_fn": "gelu", "activation_dropout": 0.3, "recompute": True},
    ],
    ids=["relu", "gelu"],
)
def test_compiles_in_one_piece(backend, options):
    """Forward and backward as torch.compile sees them, on the backend that runs them unchanged."""
    if "activation_fn" in options and torch.__version__.startswith("2.6."):
        pytest.skip("torch 2.6 cannot compile a backward function that calls torch.func.vjp")
    torch.manual_seed(0)
    layer = layer_with("sparsemixer", backend, **options).to(BFLOAT)
    x, mask = torch.randn(9, 16, dtype=BFLOAT), torch.arange(9) > 6

    def run(function):
        torch.manual_seed(1)
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y, packed, losses = function(layer, {}, leaf, mask)
        (y.float().square().sum() + losses).backward()
        return [y, packed, losses, leaf.grad, *(p.grad for p in layer.parameters())]

    compiled = torch.compile(run_layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(compiled), run(run_layer))
