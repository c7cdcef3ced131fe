"""The backend for CPUs: its gradient, what it keeps, and its weights for inference."""

import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fairseq.optim.adam import Adam as FairseqAdam
from torch.nn import functional as F
from torch.optim.optimizer import _global_optimizer_post_hooks as hooks

from fairseq_sparsemixer.moe import Experts, MoEFeedForward, Routing, feed_forward
from fairseq_sparsemixer.moe.backends import products
from fairseq_sparsemixer.moe.backends import sorted as sorted_backend
from fairseq_sparsemixer.moe.backends.memory import GRADIENTS, HUGE_PAGE, Recycler
from fairseq_sparsemixer.moe.backends.products import PackedWeights, linear, rows_to_compute
from fairseq_sparsemixer.moe.dispatch import dispatch

ACTIVATIONS = ["relu", "gelu", "silu", "tanh", "linear"]
CASES = {
    "no token": [],
    "one token": [2],
    "one expert": [1] * 7,
    "one expert and padding": [1, -1, 1, 1],
    "all padding": [-1, -1],
    "mixed": [4, 0, -1, 2, 2, 4, 0, 0, 1],
}
"""The expert of each token, of five."""


@pytest.fixture
def onednn(monkeypatch):
    """Small products go through oneDNN too."""
    monkeypatch.setattr(products, "LEAST_WEIGHTS", 0)
    monkeypatch.setattr(products, "LEAST_PRODUCTS", 0)


def routing_for(index_TK, gate_TK, num_experts):
    nothing = torch.zeros(len(index_TK), num_experts)
    return Routing(index_TK, gate_TK, nothing, nothing, nothing)


def case_index(case, top_k):
    first = torch.tensor(CASES[case], dtype=torch.long)
    columns = [torch.where(first < 0, -1, (first + k) % 5) for k in range(top_k)]
    return torch.stack(columns, dim=-1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("recompute", [False, True])
def test_gradient_is_that_of_finite_differences(case, top_k, activation, recompute):
    torch.manual_seed(0)
    experts = Experts(3, 5, 5, activation, recompute=recompute).double()
    index = case_index(case, top_k)
    gate = torch.rand(index.shape, dtype=torch.float64, requires_grad=True)
    x = torch.randn(len(index), 3, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def run(x, gate, scale, *_):
        return dispatch(x, routing_for(index, gate, 5), experts, "sorted", scale_D=scale)

    inputs = (x, gate, scale, *experts.parameters())
    assert torch.autograd.gradcheck(run, inputs, check_undefined_grad=False)


def test_rows_of_an_expert_stay_in_the_order_of_the_tokens():
    """On every machine: gradients of the weights are sums over them, equal to the last bit."""
    torch.manual_seed(0)
    x, index = torch.randn(200, 3), torch.randint(-1, 4, (200, 2))
    seen = []
    dispatch(
        x, routing_for(index, torch.rand(200, 2), 4), Experts(3, 5, 4), "sorted",
        observe=lambda *each: seen.append(each),
    )  # fmt: skip
    rows, experts = (torch.cat([each[i] for each in seen]) for i in range(2))
    for expert in range(4):
        slots = index.eq(expert).nonzero()[:, 0]
        assert torch.equal(rows[experts == expert], x[slots])


def test_equals_the_loop_in_float64():
    torch.manual_seed(1)
    layer = MoEFeedForward(8, 16, 3, router="switch").double().eval()
    x, outputs = torch.randn(40, 8, dtype=torch.float64), []
    for layer.backend in ("sorted", "loop"):
        outputs.append(layer(x)[0])
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-14)


@pytest.mark.parametrize("sizes", [(0, 4, 4), (4, 0, 4), (4, 4, 0)])
def test_experts_have_a_size(sizes):
    with pytest.raises(ValueError, match="must be at least 1, not 0"):
        Experts(*sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_experts,embed_dim,ffn_dim", [(3, 17, 29), (5, 32, 64), (1, 8, 8)])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("with_onednn", [False, True])
def test_equals_the_loop_in_every_dtype(
    dtype, num_experts, embed_dim, ffn_dim, top_k, with_onednn, request
):
    """d not a multiple of 16, N no power of two, input that is not contiguous."""
    if with_onednn:
        request.getfixturevalue("onednn")
    torch.manual_seed(1)
    top_k = min(top_k, num_experts)
    experts = Experts(embed_dim, ffn_dim, num_experts).to(dtype)
    index = torch.stack([torch.randperm(num_experts)[:top_k] for _ in range(40)])
    x = torch.randn(embed_dim, 40, dtype=dtype).t()
    weight = torch.randn(40, embed_dim)
    results = []
    for backend in ("sorted", "loop"):
        x = x.detach().requires_grad_()
        gate = torch.linspace(0.1, 1, index.numel()).view(index.shape).requires_grad_()
        scale = torch.linspace(0.5, 2, embed_dim).to(dtype).requires_grad_()
        y = dispatch(x, routing_for(index, gate, num_experts), experts, backend, scale_D=scale)
        leaves = [x, gate, scale, *experts.parameters()]
        gradients = torch.autograd.grad((y.float() * weight).sum(), leaves)
        results.append([y, *gradients])
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for value, wanted in zip(*results):
        assert value.dtype == wanted.dtype
        error = (value - wanted).float().norm() / wanted.float().norm().clamp_min(1e-6)
        assert error < tolerance


def test_frozen_parts_get_no_gradient():
    torch.manual_seed(0)
    layer = MoEFeedForward(6, 10, 4)
    x = torch.randn(9, 6, requires_grad=True)
    full = torch.autograd.grad(_seeded_loss(layer, x), [x, layer.experts.b2])
    layer.experts.requires_grad_(False)
    layer.router.requires_grad_(False)
    (x_only,) = torch.autograd.grad(_seeded_loss(layer, x), [x])
    layer.experts.b2.requires_grad_()
    (b2_only,) = torch.autograd.grad(_seeded_loss(layer, x.detach()), [layer.experts.b2])
    torch.testing.assert_close([x_only, b2_only], list(full))


def _seeded_loss(layer, x):
    torch.manual_seed(5)
    return layer(x)[0].square().sum()


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_leaves_the_same_units_in_both_passes(activation, recompute, monkeypatch):
    torch.manual_seed(0)
    experts = Experts(6, 40, 3, activation, activation_dropout=0.25, recompute=recompute)
    masks = {}
    draw = sorted_backend._Inner.mask

    def recorded(self, inner):
        mask = draw(self, inner)
        masks[len(masks)] = mask
        return mask

    monkeypatch.setattr(sorted_backend._Inner, "mask", recorded)
    index = torch.tensor([0, 1, 2, 1, 0, 2, 2, 2]).unsqueeze(-1)
    x = torch.randn(8, 6, requires_grad=True)
    gate = torch.rand(8, 1, requires_grad=True)
    y = dispatch(x, routing_for(index, gate, 3), experts, "sorted")
    expected = torch.zeros_like(y)
    function = getattr(F, activation)
    for i in range(3):
        tokens = (index[:, 0] == i).nonzero()[:, 0]
        inner = function(F.linear(x[tokens], experts.w1[i], experts.b1[i])) * masks[i] / 0.75
        out = F.linear(inner, experts.w2[i], experts.b2[i])
        expected = expected.index_add(0, tokens, out * gate[tokens])
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    leaves = [x, gate, *experts.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad((y * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
    )
    assert len(masks) == 3  # not drawn anew in the backward pass
    dropped = 1 - torch.cat(list(masks.values())).float().mean().item()
    assert 0.15 < dropped < 0.35


def test_dropping_everything_gives_the_bias():
    layer = MoEFeedForward(6, 10, 1, router="switch", activation_dropout=1.0)
    x = torch.randn(4, 6, requires_grad=True)
    y, routing = layer(x)
    torch.testing.assert_close(y, routing.gate * layer.experts.b2[0])
    y.sum().backward()
    assert x.grad.isfinite().all()
    assert (layer.experts.w1.grad == 0).all()


def test_autocast_has_the_gradient_of_float32_within_bfloat16():
    torch.manual_seed(0)
    layer = MoEFeedForward(32, 64, 4).eval()
    x = torch.randn(50, 32, requires_grad=True)
    weight = torch.randn(50, 32)
    leaves = [x, *layer.experts.parameters(), layer.router.output_scale]
    expected = torch.autograd.grad((layer(x)[0] * weight).sum(), leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = layer(x)
    for value, wanted in zip(torch.autograd.grad((y * weight).sum(), leaves), expected):
        assert value.dtype == torch.float32
        assert (value - wanted).norm() < 0.03 * wanted.norm()


def test_recomputing_keeps_less_and_changes_nothing():
    kept, results = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        layer = MoEFeedForward(16, 256, 4, activation_dropout=0.1, recompute=recompute)
        x = torch.randn(60, 16, requires_grad=True)
        sizes = {}

        def pack(value, sizes=sizes):
            sizes[value.data_ptr()] = value.nbytes
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            y, _ = layer(x)
        kept.append(sum(sizes.values()))
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    assert kept[0] - kept[1] >= 60 * 256 * 4
    for value, wanted in zip(*results):
        assert torch.equal(value, wanted)


def test_second_derivatives_are_refused():
    layer = MoEFeedForward(4, 8, 2)
    x = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again: use backend 'loop'"):
        torch.autograd.grad(layer(x)[0].square().sum(), [x], create_graph=True)


def test_backward_under_autocast():
    torch.manual_seed(0)
    layer = MoEFeedForward(8, 16, 3, router="switch")
    x = torch.randn(9, 8)
    gradients = []
    for autocast in (False, True):
        torch.manual_seed(1)
        loss = layer(x)[0].square().sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            gradients.append(torch.autograd.grad(loss, list(layer.experts.parameters())))
    assert all(map(torch.equal, *gradients))


def test_an_activation_with_parameters_is_trained():
    torch.manual_seed(0)
    activation = torch.nn.PReLU()
    layer = MoEFeedForward(6, 10, 3, activation_fn=activation)
    layer(torch.randn(5, 6))[0].sum().backward()
    assert activation.weight.grad.abs() > 0
    layer.backend = "sorted"
    with pytest.raises(ValueError, match="not a Module: choose 'auto' or 'loop'"):
        layer(torch.randn(5, 6))


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("tokens", [0, 1, 3, 70])
@pytest.mark.parametrize("sizes", [(17, 29, 3), (64, 128, 8)])
@pytest.mark.usefixtures("onednn")
def test_inference_weights_give_the_same(dtype, tolerance, tokens, sizes):
    torch.manual_seed(0)
    layer = MoEFeedForward(*sizes).eval()
    x = torch.randn(tokens, sizes[0])
    expected, _ = layer(x)
    layer.prepare_for_inference(dtype)
    assert layer.experts.packed.w1[0].is_mkldnn
    with torch.no_grad():
        y, _ = layer(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("onednn")
def test_inference_weights_serve_only_where_they_fit():
    torch.manual_seed(0)
    layer = MoEFeedForward(8, 16, 3).eval()
    x = torch.randn(5, 8)
    layer.prepare_for_inference(torch.bfloat16)
    with torch.no_grad():
        rounded, _ = layer(x)
    with_gradient, _ = layer(x)
    assert not torch.equal(rounded, with_gradient)
    layer.experts.packed, packed = None, layer.experts.packed
    with torch.no_grad():
        assert torch.equal(layer(x)[0], with_gradient)
        layer.experts.packed = packed
        layer.experts.w2.mul_(2)  # a parameter changes, as in training or loading
        changed, _ = layer(x)
        assert layer.experts.packed is None
        assert torch.equal(layer(x)[0], changed)
    for module in (layer, layer.experts):
        layer.eval().prepare_for_inference()
        module.train()  # optimizers may write where torch does not count
        assert layer.experts.packed is None and layer.experts.training


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda parameters: torch.optim.SGD(parameters, 0.1),
        lambda parameters: torch.optim.Adam(parameters, 0.1, fused=True),
        lambda parameters: FairseqAdam(parameters, 0.1),
    ],
    ids=["SGD", "fused Adam", "fairseq's Adam"],
)
@pytest.mark.usefixtures("onednn")
def test_inference_weights_are_dropped_at_an_optimizers_step(optimizer):
    """In evaluation mode too, and where it writes so that torch does not count it."""
    torch.manual_seed(0)
    layer = MoEFeedForward(8, 16, 3, router="switch").eval()
    x = torch.randn(5, 8)
    optimizer = optimizer(layer.parameters())
    layer(x)[0].sum().backward()
    layer.prepare_for_inference()
    with torch.no_grad():
        layer(x)
    assert layer.experts.packed is not None
    optimizer.step()
    expected, _ = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0], expected)
    layer.prepare_for_inference()
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0], expected)
    assert layer.experts.packed is not None, "laid out anew"


@pytest.mark.usefixtures("onednn")
def test_no_hook_on_optimizers_stays():
    before = len(hooks)
    layer = MoEFeedForward(8, 16, 3).eval()
    layer.prepare_for_inference()
    assert len(hooks) == before + 1
    layer.experts.packed = None
    assert len(hooks) == before


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"backend": "loop"}, "backend 'loop' has no use for it"),
        ({"activation_fn": torch.nn.ReLU()}, "a Module takes backend 'loop'"),
        ({}, "128 weights a matrix"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_dtypes_that_cannot_be_had_are_reported_once(settings, reason, dtype, caplog):
    feed_forward._warn_of_float32.cache_clear()
    layers = [MoEFeedForward(8, 16, 3, **settings).eval() for _ in range(2)]
    for layer in layers:
        layer.prepare_for_inference()
        assert layer.experts.packed is None
    assert not caplog.records
    for layer in layers:
        layer.prepare_for_inference(dtype)
    (record,) = caplog.records
    assert reason in record.message


@pytest.mark.usefixtures("onednn")
def test_models_made_in_inference_mode_are_not_packed():
    with torch.inference_mode():
        layer = MoEFeedForward(8, 16, 3).eval()
        layer.prepare_for_inference()
        assert layer.experts.packed is None
        assert layer(torch.randn(2, 8))[0].isfinite().all()


@pytest.mark.usefixtures("onednn")
def test_inference_weights_are_left_out_of_copies():
    layer = MoEFeedForward(8, 16, 3).eval()
    layer.prepare_for_inference()
    assert isinstance(layer.experts.packed, PackedWeights)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.experts.packed is None
        x = torch.randn(5, 8)
        with torch.no_grad():
            torch.testing.assert_close(other(x)[0], layer(x)[0])
    with pytest.raises(ValueError, match=r"torch\.bfloat16 or torch\.int8, not torch\.int16"):
        layer.prepare_for_inference(torch.int16)


@pytest.mark.usefixtures("onednn")
def test_nothing_is_packed_without_onednn(monkeypatch):
    torch.manual_seed(0)
    layer = MoEFeedForward(8, 16, 3).eval()
    x = torch.randn(5, 8)
    expected, _ = layer(x)
    monkeypatch.setattr(products, "_LINEAR", None)
    layer.prepare_for_inference()
    assert layer.experts.packed is None
    torch.testing.assert_close(layer(x)[0], expected)
    torch.testing.assert_close(
        linear(x, torch.ones(2, 8), torch.tensor([-100.0, 100.0]), relu=True)[:, 0], torch.zeros(5)
    )


LARGE = (3, HUGE_PAGE // 4)


@pytest.mark.parametrize("shape", [(0,), (3, 5), LARGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradient_memory_is_as_asked_for(shape, dtype):
    value = torch.empty(shape, dtype=dtype)
    fresh = Recycler().empty_like(value)
    assert (fresh.shape, fresh.dtype) == (value.shape, value.dtype)
    assert fresh.is_contiguous()
    fresh.fill_(1)  # all of it may be written
    assert (fresh == 1).all()


def test_gradient_memory_is_used_again_once_nobody_has_it():
    like = torch.empty(LARGE)

    def is_used_again(hold):
        """Whether the next memory is the last, something of which is still held."""
        recycler = Recycler()  # with no other memory to choose
        first = recycler.empty_like(like)
        place, held = first.data_ptr(), hold(first)
        del first
        again = recycler.empty_like(like).data_ptr() == place
        del held
        return again

    assert is_used_again(lambda value: None)
    assert not is_used_again(lambda value: value)
    assert not is_used_again(lambda value: value[1:])
    assert not is_used_again(lambda value: value.detach())
    assert not is_used_again(lambda value: value.numpy())
    assert not is_used_again(lambda value: value.untyped_storage())
    recycler = Recycler()
    recycler.empty_like(like)
    recycler.empty_like(torch.empty(4, HUGE_PAGE))  # fits nothing: what is unused is given back
    assert len(recycler._blocks) == 1


def test_memory_that_other_processes_may_use_is_not_used_again():
    recycler = Recycler()
    like = torch.empty(LARGE)
    recycler.empty_like(like).share_memory_()
    assert not recycler.empty_like(like).is_shared()


def test_gradient_memory_in_several_threads():
    recycler = Recycler()

    def wrong(number):
        count = 0
        for step in range(300):
            value = recycler.empty_like(torch.empty(1 + (step + number) % 3, HUGE_PAGE // 4))
            value[:, :8] = number
            count += int((value[:, :8] != number).any())
        return count

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(wrong, range(4))) == [0] * 4


def test_gradients_that_are_kept_stay_as_they_are():
    torch.manual_seed(0)
    layer = MoEFeedForward(256, 1024, 3)
    w1 = layer.experts.w1
    assert w1.nbytes >= HUGE_PAGE
    x = torch.randn(20, 256)
    seen = []
    for step in range(4):
        w1.grad = None
        layer(x * step)[0].sum().backward()
        seen.append((w1.grad, w1.grad.clone()))
    for _ in range(3):  # accumulated: the second gradient is memory that only autograd has
        layer(x)[0].sum().backward()
    for kept, copy_ in seen[:-1]:
        assert torch.equal(kept, copy_)
    assert not torch.equal(*seen[-1])


def test_rows_come_in_few_sizes():
    """Each size is a program that oneDNN compiles once and keeps, of a thousand."""
    sizes = {rows_to_compute(rows) for rows in range(1, 4097)}
    assert 4 * len(sizes) < 1000
    for rows in range(1, 4097):
        assert rows <= rows_to_compute(rows) <= max(rows + 15, 1.13 * rows)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("case", CASES)
def test_rows_of_other_experts_leave_no_trace(case):
    """Rows are computed beyond an expert's own; infinite ones must not reach it."""
    torch.manual_seed(0)
    experts = Experts(6, 10, 5)
    index = case_index(case, 1)
    gate = torch.rand(index.shape)
    clean = torch.randn(len(index), 6)
    weight = torch.randn(len(index), 6)
    for spoilt in range(5):
        own = index[:, 0] != spoilt
        x = torch.where(own.unsqueeze(-1), clean, float("inf")).requires_grad_()
        y = dispatch(x, routing_for(index, gate, 5), experts, "sorted")
        (grad,) = torch.autograd.grad(y, x, weight)
        x_clean = clean.clone().requires_grad_()
        expected = dispatch(x_clean, routing_for(index, gate, 5), experts, "loop")
        (wanted,) = torch.autograd.grad(expected, x_clean, weight)
        torch.testing.assert_close(y[own], expected[own])
        torch.testing.assert_close(grad[own], wanted[own])


def test_gradient_memory_is_given_back_with_the_model():
    GRADIENTS._blocks.clear()
    layer = MoEFeedForward(512, 512, 4, router="switch")
    for _ in range(2):
        layer(torch.randn(5, 512))[0].sum().backward()
        layer.zero_grad()
    gradients = sum(block.nbytes() for block in GRADIENTS._blocks)
    assert gradients == 2 * layer.experts.w1.nbytes
    other = copy.deepcopy(layer)
    other(torch.randn(5, 512))[0].sum().backward()
    del layer, other
    gc.collect()
    assert not GRADIENTS._blocks
