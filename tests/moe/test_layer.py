"""MoEFeedForward, its backends and its losses."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from support.reference import expert_output
from support.reference_routers import ids
from support.routers import FixedRouter

from fairseq_sparsemixer.moe import (
    ROUTERS,
    MoEFeedForward,
    Routing,
    RoutingStatistics,
    load_balance_loss,
    z_loss,
)
from fairseq_sparsemixer.moe.dispatch import BACKENDS, OBSTACLES, dispatch

CPU = torch.device("cpu")
BACKEND_NAMES = sorted(
    name
    for name in BACKENDS
    if name not in OBSTACLES or OBSTACLES[name](CPU, torch.float32) is None
)


def smallest_layer(router, num_experts=4, **options):
    top_k = ROUTERS[router].min_top_k
    return MoEFeedForward(6, 10, max(num_experts, top_k), router=router, top_k=top_k, **options)


def naive_mixture(layer, x_TD, routing):
    rows = []
    for t, x in enumerate(x_TD):
        row = torch.zeros_like(x)
        for i, gate in zip(routing.expert_index[t].tolist(), routing.gate[t]):
            if i >= 0:
                row = row + gate * expert_output(layer.experts, i, x)
        rows.append(row)
    return torch.stack(rows) if rows else torch.zeros_like(x_TD)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("case", ["mixed", "one expert", "one token", "no token", "all padding"])
def test_backends_equal_the_naive_loop(backend, top_k, case):
    torch.manual_seed(3)
    tokens = {"one token": 1, "no token": 0}.get(case, 11)
    layer = MoEFeedForward(6, 10, 5, backend=backend)
    index = torch.stack([torch.randperm(5)[:top_k] for _ in range(tokens)] or [torch.empty(top_k)])
    index = index[:tokens].long()
    if case == "one expert":
        index = torch.arange(2, 2 + top_k).expand(tokens, top_k).clone()
    gate = torch.rand(tokens, top_k, requires_grad=True)
    layer.router = FixedRouter(index, gate, embed_dim=6, num_experts=5)
    mask = torch.zeros(tokens, dtype=torch.bool)
    mask[2:4] = True
    if case == "all padding":
        mask[:] = True
    x = torch.randn(tokens, 6, requires_grad=True)
    y, routing = layer(x, mask)
    expected = naive_mixture(layer, x, routing)
    torch.testing.assert_close(y, expected)
    assert (y[mask] == 0).all()
    weight = torch.randn_like(y)
    leaves = [*layer.experts.parameters(), x, gate]
    actual = torch.autograd.grad((y * weight).sum(), leaves, retain_graph=True)
    # Zeros of the graph where the naive loop touches nothing.
    naive_loss = (expected * weight).sum() + sum(0 * leaf.sum() for leaf in leaves)
    for value, wanted in zip(actual, torch.autograd.grad(naive_loss, leaves)):
        torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_has_shape_and_dtype_of_the_input(backend, dtype):
    torch.manual_seed(0)
    layer = MoEFeedForward(8, 16, 4, backend=backend).to(dtype)
    x = torch.randn(3, 5, 8, dtype=dtype, requires_grad=True)
    y, routing = layer(x)
    assert y.shape == x.shape
    assert y.dtype == dtype
    assert routing.expert_index.shape == (15, 1)
    y.float().sum().backward()
    assert x.grad.dtype == dtype
    assert all(p.grad.dtype == dtype for p in layer.parameters())


def test_autocast_equals_float32_within_bfloat16():
    torch.manual_seed(0)
    layer = MoEFeedForward(32, 64, 4).eval()
    x = torch.randn(50, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, routing = layer(x)
    expected, expected_routing = layer(x)
    assert y.dtype == torch.float32
    assert torch.equal(routing.expert_index, expected_routing.expert_index)
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("router", sorted(ROUTERS))
def test_non_contiguous_input(router):
    torch.manual_seed(0)
    layer = smallest_layer(router).eval()
    x = torch.randn(6, 5, 3).permute(2, 1, 0)
    assert not x.is_contiguous()
    more = ids(router, torch.randint(99, (5, 3)).t())
    torch.testing.assert_close(layer(x, **more)[0], layer(x.contiguous(), **more)[0])


@pytest.mark.parametrize("router", sorted(ROUTERS))
@pytest.mark.parametrize("num_experts", [1, 3])
@pytest.mark.parametrize("tokens", [0, 1, 8])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("backend", [name for name in BACKEND_NAMES if name != "triton"])  # slow
def test_every_parameter_gets_a_gradient(router, num_experts, tokens, padded, backend):
    """Zero where an expert got no token: data-parallel training waits for all gradients."""
    torch.manual_seed(0)
    layer = smallest_layer(router, num_experts, backend=backend)
    x = torch.randn(tokens, 6, requires_grad=True)
    mask = torch.ones(tokens, dtype=torch.bool) if padded else None
    y, routing = layer(x, mask, **ids(router, torch.arange(tokens)))
    (y.sum() + load_balance_loss(routing) + z_loss(routing)).backward()
    for parameter in [*layer.parameters(), x]:
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    if padded or tokens == 0:
        assert load_balance_loss(routing) == 0
        assert layer.experts.w1.grad.abs().sum() == 0


@pytest.mark.parametrize("router", sorted(ROUTERS))
@pytest.mark.parametrize("training", [True, False])
def test_padding_changes_nothing(router, training, monkeypatch):
    """A padded batch: outputs, losses and gradients of its sentences without padding."""
    torch.manual_seed(0)
    lengths = [4, 1, 6]
    layer = smallest_layer(router).train(training)
    sentences = [torch.randn(n, 6) for n in lengths]
    padded = torch.full((3, 6, 6), 1e4)
    mask = torch.ones(3, 6, dtype=torch.bool)
    for b, sentence in enumerate(sentences):
        padded[b, : lengths[b]] = sentence
        mask[b, : lengths[b]] = False
    # The same noise for the same token, wherever it lies.
    noise = torch.rand(18, 4).clamp_min(1e-3)

    def rows(like):
        full = like.shape[0] == 18
        return noise if full else noise[~mask.flatten()]

    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self: self.copy_(rows(self)))
    monkeypatch.setattr(
        torch.Tensor, "uniform_", lambda self, a, b: self.copy_(a + (b - a) * rows(self))
    )
    monkeypatch.setattr(torch, "rand_like", lambda x: rows(x)[:, :1])
    monkeypatch.setattr(torch, "randn_like", rows)
    monkeypatch.setattr(torch, "randint_like", lambda x, high: (rows(x)[:, :1] * high).floor())
    numbers = torch.arange(18).view(3, 6)

    def run(x, padding_mask):
        layer.zero_grad()
        token_ids = numbers if padding_mask is not None else numbers[~mask]
        y, routing = layer(x, padding_mask, **ids(router, token_ids))
        kept = y[~padding_mask] if padding_mask is not None else y
        weight = torch.arange(kept.numel()).view_as(kept) / kept.numel()
        losses = load_balance_loss(routing), z_loss(routing)
        ((kept * weight).sum() + sum(losses)).backward()
        return kept, losses, [p.grad.clone() for p in layer.parameters() if p.grad is not None]

    with_padding = run(padded, mask)
    without = run(torch.cat(sentences), None)
    torch.testing.assert_close(with_padding, without)
    assert (layer(padded, mask, **ids(router, numbers))[0][mask] == 0).all()


def test_linear_prediction_is_the_control_variate_by_its_formula():
    """sparsemixer-cv with prediction="linear": fitted lines, forward untouched, gradient added."""
    torch.manual_seed(0)
    options = {"jitter_eps": 1e9, "first_order_on_argmax": False}
    layer = MoEFeedForward(6, 10, 3, router="sparsemixer-cv", prediction="linear", **options)
    plain = MoEFeedForward(6, 10, 3, router="sparsemixer", **options)
    plain.load_state_dict(
        {name: v for name, v in layer.state_dict().items() if "expert_means" not in name}
    )
    x, u = torch.randn(200, 6), torch.randn(200, 6)
    for _ in range(layer.router.expert_means.SOLVE_EVERY):
        layer(x)
        layer.end_update()

    def run(mixture):
        torch.manual_seed(7)
        y, routing = mixture(x)
        (y * u).sum().backward()
        return y, routing, mixture.router.weight.grad

    y, routing, gradient = run(layer)
    expected_y, _, expected = run(plain)
    assert torch.equal(y, expected_y)
    columns = torch.cat([x, torch.ones(200, 1)], dim=1)
    predicted = torch.stack([columns @ a for a in layer.router.expert_means.weight], dim=1)
    outputs = torch.stack([expert_output_rows(layer.experts, i, x) for i in range(3)], dim=1)
    assert (outputs - predicted).square().sum() < 0.3 * outputs.square().sum()
    # sum_i p_i c_i dp_i - c_D dp_D with c_i = 2 u . omega m_i(x), by autograd through the softmax
    z = routing.logits.detach().requires_grad_()
    p = z.softmax(-1)
    c = 2 * torch.einsum("td,tnd->tn", u, predicted)
    chosen = routing.expert_index
    term = (p.detach() * c * p).sum() - (c.gather(1, chosen) * p.gather(1, chosen)).sum()
    (grad_z,) = torch.autograd.grad(term, z)
    torch.testing.assert_close(gradient, expected + grad_z.t() @ x, rtol=1e-4, atol=1e-4)


def expert_output_rows(experts, i, x_TD):
    return torch.stack([expert_output(experts, i, x) for x in x_TD]).detach()


def test_evaluation_does_not_depend_on_the_batch():
    torch.manual_seed(0)
    layer = MoEFeedForward(16, 32, 4).eval()
    x = torch.randn(40, 16)
    whole, _ = layer(x)
    torch.testing.assert_close(torch.cat([layer(row)[0].view(1, -1) for row in x]), whole)
    # No capacity: a crowd at one expert drops nothing.
    crowd, routing = layer(x[:1].expand(500, -1))
    assert len(set(routing.expert_index.flatten().tolist())) == 1
    torch.testing.assert_close(crowd, whole[:1].expand(500, -1))


def test_load_balance_loss_by_its_formula():
    torch.manual_seed(0)
    layer = MoEFeedForward(6, 10, 5, router="switch", jitter_eps=0.0)
    x = torch.randn(12, 6)
    mask = torch.arange(12) >= 9
    _, routing = layer(x, mask)
    share, mean = [0.0] * 5, [0.0] * 5
    for t in range(9):
        share[int(routing.expert_index[t])] += 1 / 9
        for i in range(5):
            mean[i] = mean[i] + routing.probs[t, i] / 9
    expected = 5 * sum(f * p for f, p in zip(share, mean))
    torch.testing.assert_close(load_balance_loss(routing), expected)
    expected_z = sum(routing.logits[t].logsumexp(-1) ** 2 for t in range(9)) / 9
    torch.testing.assert_close(z_loss(routing), expected_z)


def test_load_balance_loss_is_one_when_uniform():
    logits = torch.zeros(8, 4)
    index = torch.arange(8).remainder(4).unsqueeze(-1)
    probs = logits.softmax(-1)
    routing = Routing(index, torch.ones(8, 1), logits, probs, probs)
    assert load_balance_loss(routing).item() == pytest.approx(1.0)
    crowded = dataclasses.replace(routing, expert_index=torch.zeros(8, 1, dtype=torch.long))
    assert load_balance_loss(crowded).item() == pytest.approx(1.0)  # P is uniform
    sure = torch.tensor([[9.0, 0, 0, 0]]).expand(8, -1).softmax(-1)
    collapsed = dataclasses.replace(crowded, probs=sure)
    assert load_balance_loss(collapsed).item() == pytest.approx(4 * sure[0, 0].item())


def test_statistics_of_two_batches_add_up():
    torch.manual_seed(0)
    layer = MoEFeedForward(6, 10, 4, router="switch", jitter_eps=0.0)
    a, b = torch.randn(7, 6), torch.randn(3, 6)
    packed = [RoutingStatistics.from_routing(layer(x)[1]).pack() for x in (a, b, torch.cat([a, b]))]
    torch.testing.assert_close(packed[0] + packed[1], packed[2])
    whole = RoutingStatistics.unpack(packed[2])
    assert whole.tokens == 10
    assert whole.expert_tokens.sum() == 10
    probs = layer(torch.cat([a, b]))[1].probs
    entropy = -(probs * probs.log()).sum(-1).mean()
    torch.testing.assert_close(whole.mean_entropy, entropy)
    torch.testing.assert_close(whole.pack(), packed[2])


def test_losses_are_float32_and_differentiable_under_bfloat16():
    torch.manual_seed(0)
    layer = MoEFeedForward(6, 10, 4).to(torch.bfloat16)
    _, routing = layer(torch.randn(9, 6, dtype=torch.bfloat16))
    loss = load_balance_loss(routing) + z_loss(routing)
    assert loss.dtype == torch.float32
    loss.backward()
    assert layer.router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "fast"}, "unknown backend 'fast'; choose from auto"),
        ({"activation_fn": "rleu"}, "unknown activation_fn 'rleu'"),
        ({"activation_dropout": 1.5}, "activation_dropout must be 0 to 1"),
        ({"ffn_dim": 0}, "ffn_dim must be at least 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MoEFeedForward(**{"embed_dim": 4, "ffn_dim": 8, "num_experts": 2, **arguments})


def test_bad_shapes():
    layer = MoEFeedForward(4, 8, 2)
    with pytest.raises(ValueError, match=r"x must be \(\.\.\., 4\)"):
        layer(torch.randn(3, 5))
    with pytest.raises(ValueError, match="padding_mask must be"):
        layer(torch.randn(3, 2, 4), torch.zeros(2, 3, dtype=torch.bool))


def test_activation_dropout_only_in_training():
    torch.manual_seed(0)
    layer = MoEFeedForward(8, 64, 2, router="switch", jitter_eps=0.0, activation_dropout=0.5)
    x = torch.randn(20, 8)
    assert not torch.allclose(layer(x)[0], layer(x)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


def test_dispatch_is_the_seam_for_any_routing():
    torch.manual_seed(0)
    layer = MoEFeedForward(6, 10, 4)
    x = torch.randn(9, 6)
    _, routing = layer(x)
    results = [dispatch(x, routing, layer.experts, name) for name in ("auto", *BACKEND_NAMES)]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_moe_works_without_fairseq():
    code = (
        "import sys; sys.modules['fairseq'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'fairseq' else find(name, *a)\n"
        "import torch; from fairseq_sparsemixer.moe import MoEFeedForward\n"
        "y, _ = MoEFeedForward(4, 8, 2)(torch.randn(3, 4)); print(tuple(y.shape))\n"
        "assert not [m for m in sys.modules if m.startswith(('fairseq.', 'hydra', 'omegaconf'))]"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "(3, 4)"
