"""Routers against the papers' formulas and against the exact gradient."""

import math

import pytest
import torch
from support.reference import assert_same_gradients, kept_experts, sparsemixer_layer, switch_layer
from support.reference_routers import SPARSEMIXERS, ids, smallest

from fairseq_sparsemixer.moe import ROUTERS, MoEFeedForward, build_router
from fairseq_sparsemixer.moe.routers import sparsemixer
from fairseq_sparsemixer.moe.routers.sparsemixer import sample, unreachable

SIZES = [(1, 1), (1, 4), (2, 1), (7, 3), (13, 5)]  # tokens, experts


def random_layer(num_experts, router, **options):
    layer = MoEFeedForward(6, 10, num_experts, router=router, **options)
    if layer.router.output_scale is not None:
        torch.nn.init.normal_(layer.router.output_scale)
    return layer


@pytest.mark.parametrize(("tokens", "experts"), SIZES)
@pytest.mark.parametrize("training", [True, False])
def test_switch_equals_naive_loop(tokens, experts, training):
    torch.manual_seed(tokens + experts)
    layer = random_layer(experts, "switch", jitter_eps=0.3).train(training)
    x = torch.randn(tokens, 6, requires_grad=True)
    state = torch.get_rng_state()
    noise = torch.empty(tokens, experts).uniform_(0.7, 1.3) if training else None
    torch.set_rng_state(state)
    y, routing = layer(x)
    expected, chosen = switch_layer(layer, x, noise)
    torch.testing.assert_close(y, expected)
    assert routing.expert_index.flatten().tolist() == chosen
    weight = torch.randn_like(y)
    assert_same_gradients(layer, (y * weight).sum(), (expected * weight).sum(), [x])


@pytest.mark.parametrize(("tokens", "experts"), SIZES)
@pytest.mark.parametrize(
    ("router", "order", "override"),
    [("sparsemixer", 2, True), ("sparsemixer", 2, False), ("sparsemixer-1st", 1, True)],
)
@pytest.mark.parametrize("jitter_eps", [0.1, 1e9])
def test_sparsemixer_equals_naive_loop(
    tokens, experts, router, order, override, jitter_eps, monkeypatch
):
    torch.manual_seed(tokens * experts)
    options = {} if override else {"first_order_on_argmax": False}
    layer = random_layer(experts, router, jitter_eps=jitter_eps, **options)
    x = torch.randn(tokens, 6, requires_grad=True)
    coin = torch.rand(tokens, 1)
    monkeypatch.setattr(torch, "rand_like", lambda _: coin)
    y, routing = layer(x)
    half = (coin >= 0.5).flatten().tolist()
    choice = routing.expert_index.flatten().tolist()
    expected = sparsemixer_layer(layer, x, choice, half, order=order, override=override)
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    assert_same_gradients(layer, (y * weight).sum(), (expected * weight).sum(), [x])


def test_sparsemixer_evaluation_is_the_masked_argmax():
    torch.manual_seed(0)
    layer = random_layer(5, "sparsemixer").eval()
    x = torch.randn(20, 6)
    y, routing = layer(x)
    best = routing.logits.argmax(-1)
    assert torch.equal(routing.expert_index[:, 0], best)
    expected = sparsemixer_layer(layer, x, best.tolist(), [False] * 20)
    torch.testing.assert_close(y, expected)


def estimator_mean(router_name, logits, outputs, f, monkeypatch, **options):
    """The estimator's expected gradient to the logits, by enumerating all its draws.

    One row for each (expert D, coin); a row counts with probability p~_D / 2.
    """
    num_experts = len(logits)
    router = build_router(
        router_name, embed_dim=1, num_experts=num_experts, jitter_eps=1e9, **options
    )
    draws = [(d, coin) for d in range(num_experts) for coin in (0.25, 0.75)]
    choice = torch.tensor([[d] for d, _ in draws])
    coins = torch.tensor([[coin] for _, coin in draws])
    monkeypatch.setattr(sparsemixer, "sample", lambda _: choice)
    monkeypatch.setattr(torch, "rand_like", lambda _: coins)
    z = logits.clone().requires_grad_()
    routing = router.route(z.expand(len(draws), -1))
    losses = f(routing.gate * outputs[choice[:, 0]])
    probability = logits.softmax(-1)[choice[:, 0]] / 2
    return torch.autograd.grad((probability * losses).sum(), z)[0]


def exact_gradient(logits, outputs, f):
    """d/dz sum_i p_i f(p_i E_i)."""
    z = logits.clone().requires_grad_()
    p = z.softmax(-1)
    return torch.autograd.grad((p * f(p.unsqueeze(-1) * outputs)).sum(), z)[0]


def polynomial(degree, width, seed):
    """f: (rows, width) -> (rows,) of the given degree, with a constant term."""
    generator = torch.Generator().manual_seed(seed)
    linear = torch.randn(width, generator=generator)
    matrix = torch.randn(width, width, generator=generator)

    def f(h):
        value = 3.0 + h @ linear
        if degree >= 2:
            value = value + ((h @ matrix) * h).sum(-1)
        if degree >= 3:
            value = value + h.sum(-1) ** 3
        return value

    return f


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_experts", [2, 4, 7])
def test_mid_point_is_unbiased_for_quadratics_and_euler_is_not(seed, num_experts, monkeypatch):
    torch.manual_seed(seed)
    logits, outputs = torch.randn(num_experts), 2 * torch.randn(num_experts, 3)
    f = polynomial(2, 3, seed)
    exact = exact_gradient(logits, outputs, f)
    mid_point = estimator_mean(
        "sparsemixer", logits, outputs, f, monkeypatch, first_order_on_argmax=False
    )
    euler = estimator_mean("sparsemixer-1st", logits, outputs, f, monkeypatch)
    torch.testing.assert_close(mid_point, exact, rtol=1e-4, atol=1e-5)
    assert (euler - exact).norm() > 0.02 * exact.norm()


@pytest.mark.parametrize("seed", range(3))
def test_both_orders_are_unbiased_for_linear_f_and_neither_for_cubic_f(seed, monkeypatch):
    torch.manual_seed(seed)
    logits, outputs = torch.randn(4), 4 * torch.randn(4, 3)
    for name, options in (
        ("sparsemixer", {"first_order_on_argmax": False}),
        ("sparsemixer-1st", {}),
    ):
        for degree in (1, 3):
            f = polynomial(degree, 3, seed)
            exact = exact_gradient(logits, outputs, f)
            mean = estimator_mean(name, logits, outputs, f, monkeypatch, **options)
            if degree == 1:
                torch.testing.assert_close(mean, exact, rtol=1e-4, atol=1e-5)
            else:
                assert (mean - exact).norm() > 1e-3 * exact.norm()


def test_argmax_override_biases_the_mid_point(monkeypatch):
    """The override trades exactness for experts trained on full outputs."""
    torch.manual_seed(0)
    logits, outputs = torch.randn(4), 2 * torch.randn(4, 3)
    f = polynomial(2, 3, 0)
    exact = exact_gradient(logits, outputs, f)
    mean = estimator_mean("sparsemixer", logits, outputs, f, monkeypatch)
    assert (mean - exact).norm() > 0.02 * exact.norm()


@pytest.mark.parametrize(
    "logits",
    [
        [0.0, 0.0, 0.0],
        [1.0, 0.9, 0.5],
        [1.0, -0.1, 0.81],
        [0.0, -0.1, -5.0],
        [-1.0, -1.1, -3.0],
        [-1e-30, -2e-30, 0.0],
        [1e30, 0.79e30, 0.81e30],
    ],
)
@pytest.mark.parametrize("eps", [0.0, 0.1, 0.25, 1e9, 1e300])
def test_mask_follows_the_ratio_rule(logits, eps):
    row = torch.tensor([logits])
    masked = unreachable(row, row.amax(dim=-1, keepdim=True), eps)[0].tolist()
    if eps >= 1e9 or set(logits) == {0.0}:
        assert masked == [False] * 3
    else:
        values = torch.tensor(logits).double().tolist()
        assert masked == [not kept for kept in kept_experts(values, eps)]


@pytest.mark.parametrize("name", sorted(ROUTERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_masked_expert_is_never_drawn(name, dtype):
    torch.manual_seed(0)
    router = smallest(name, embed_dim=4, num_experts=16, jitter_eps=0.1)
    logits = (torch.randn(20_000, 16) * 3).to(dtype)
    routing = router.route(logits, **ids(name, torch.arange(20_000)))
    used = routing.chosen >= 0
    drawn = routing.sampling_probs.gather(1, routing.chosen.clamp_min(0))
    assert (drawn > 0)[used].all()
    if name in SPARSEMIXERS:
        masked = unreachable(logits.float(), logits.float().amax(dim=-1, keepdim=True), 0.1)
        assert masked.any()
        assert not masked.gather(1, routing.expert_index).any()


def test_gumbel_noise_cannot_reach_a_masked_expert(monkeypatch):
    """Exponential noise of exactly 0 would be infinite Gumbel noise: inf - inf."""
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self: self.zero_())
    logits = torch.tensor([[float("-inf"), 1.0, 2.0]])
    assert sample(logits).item() in (1, 2)


def test_sampling_frequencies_follow_the_masked_softmax():
    torch.manual_seed(1)
    logits = torch.tensor([1.0, 0.95, 0.9, 0.2])
    draws = 40_000
    router = build_router("sparsemixer", embed_dim=1, num_experts=4, jitter_eps=0.1)
    routing = router.route(logits.expand(draws, -1))
    expected = routing.sampling_probs[0] * draws
    assert expected[3] == 0
    counts = routing.expert_index.flatten().bincount(minlength=4)
    chi_square = ((counts[:3] - expected[:3]) ** 2 / expected[:3]).sum()
    assert chi_square < 13.8  # 2 degrees of freedom, p = 0.001


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_evaluation_is_deterministic_and_by_token(name):
    torch.manual_seed(0)
    router = smallest(name).eval()
    x, tokens = torch.randn(50, 8), torch.randint(1000, (50,))
    first, second = router(x, **ids(name, tokens)), router(x, **ids(name, tokens))
    assert torch.equal(first.expert_index, second.expert_index)
    assert torch.equal(first.gate, second.gate)
    order = torch.randperm(50)
    permuted = router(x[order], **ids(name, tokens[order]))
    assert torch.equal(permuted.expert_index, first.expert_index[order])
    alone = torch.cat(
        [router(x[t : t + 1], **ids(name, tokens[t : t + 1])).gate for t in range(50)]
    )
    if router.causal:
        torch.testing.assert_close(alone, first.gate)
    else:  # the choice of a token alone is another one
        assert not torch.allclose(alone, first.gate)


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_nothing_of_the_caller_is_edited(name):
    torch.manual_seed(0)
    router = smallest(name)
    logits, x = torch.randn(9, 4), torch.randn(9, 8)
    mask, tokens = torch.arange(9) > 5, torch.arange(9)
    before = [value.clone() for value in (logits, x, mask, tokens)]
    routing = router.route(logits, mask, **ids(name, tokens))
    router(x, mask, **ids(name, tokens))
    for value, copy in zip((logits, x, mask, tokens), before):
        assert torch.equal(value, copy)
    assert (routing.expert_index[6:] == -1).all()
    assert (routing.gate[6:] == 0).all()
    used = routing.expert_index[:6] >= 0
    if router.causal:
        assert used[:, 0].all()
    else:
        assert used.sum(0).tolist() == [2] * 4  # ceil(6 / 4) for each expert
    assert used.all() or name in ("gshard", "expert-choice")


@pytest.mark.parametrize("name", sorted(ROUTERS))
@pytest.mark.parametrize("mode", ["half", "bfloat16", "autocast"])
def test_router_arithmetic_is_float32(name, mode):
    torch.manual_seed(0)
    router = smallest(name, embed_dim=64, num_experts=8).eval()
    x, tokens = torch.randn(30, 64), torch.arange(30)
    if mode == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            routing = router(x, **ids(name, tokens))
    else:
        dtype = getattr(torch, mode)
        router, x = router.to(dtype), x.to(dtype)
        routing = router(x, **ids(name, tokens))
    for value in (routing.logits, routing.probs, routing.gate):
        assert value.dtype == torch.float32
    assert routing.expert_index.dtype == torch.int64
    if router.weight is not None:
        expected = x.float() @ router.weight.float().t() + router.bias.float()
        torch.testing.assert_close(routing.logits, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "sparsmixer"}, "did you mean 'sparsemixer'"),
        ({"name": "xyz"}, "unknown router 'xyz'; choose from"),
        ({"num_experts": 0}, "num_experts must be at least 1, not 0"),
        ({"embed_dim": 0}, "embed_dim must be at least 1, not 0"),
        ({"top_k": 0}, "top_k must be 1 to num_experts"),
        ({"top_k": 5}, r"top_k must be 1 to num_experts \(4\), not 5"),
        ({"top_k": 2}, "top_k must be 1 for router 'sparsemixer', not 2"),
        ({"jitter_eps": -0.1}, "jitter_eps must be"),
        ({"jitter_eps": math.nan}, "jitter_eps must be"),
        ({"name": "switch", "jitter_eps": 1.0}, "below 1 for router 'switch'"),
        ({"init_scale": -1.0}, "init_scale must be"),
    ],
)
def test_bad_arguments(arguments, message):
    name = arguments.pop("name", "sparsemixer")
    with pytest.raises(ValueError, match=message):
        build_router(name, **{"embed_dim": 8, "num_experts": 4, **arguments})


def test_initial_weights_scale_and_bias():
    torch.manual_seed(0)
    plain = build_router("switch", embed_dim=64, num_experts=8)
    torch.manual_seed(0)
    small = build_router("switch", embed_dim=64, num_experts=8, init_scale=0.1, bias=False)
    assert small.bias is None
    torch.testing.assert_close(small.weight, 0.1 * plain.weight)
    assert plain.weight.abs().max() <= 1 / 8
