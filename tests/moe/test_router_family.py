"""Every router against naive loops, against its distribution and against the exact gradient."""

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.reference import assert_same_gradients, expert_output
from support.reference_routers import (
    ESTIMATORS,
    SPARSEMIXERS,
    Draws,
    fits,
    forbid_randomness,
    ids,
    naive_layer,
    noisy_load,
    smallest,
    squared_variation,
)

from fairseq_sparsemixer.moe import ROUTERS, MoEFeedForward, RoutingStatistics, build_router
from fairseq_sparsemixer.moe.routers.sparsemixer import unreachable

# 1. Naive loops

CASES = [
    *((name, {}) for name in ROUTERS),
    ("topk", {"renormalise": True}),
    ("topk", {"balance_bias_rate": 0.1}),
    ("gshard", {"balance_bias_rate": 0.1}),
    ("default-moe", {"balance_bias_rate": 0.1}),
    ("sparsemixer", {"first_order_on_argmax": False}),
    ("sparsemixer", {"quadrature": "uniform"}),
    ("sparsemixer", {"quadrature": "uniform", "first_order_on_argmax": False}),
    ("sparsemixer", {"omega": False}),
    ("sparsemixer", {"balance_bias_rate": 0.1}),
    ("sparsemixer", {"jitter_eps": 1e9}),
    ("sparsemixer-cv", {"jitter_eps": 1e9, "first_order_on_argmax": False}),
    ("sparsemixer-cv", {"balance_bias_rate": 0.1}),
    ("sparsemixer-v2", {"first_order_on_argmax": False}),
    ("sparsemixer-v2", {"jitter_eps": 1e9}),
    ("sparsemixer-v2-star", {"first_order_on_argmax": False}),
    ("sparsemixer-v2-star", {"jitter_eps": 1e9}),
    ("straight-through", {"balance_bias_rate": 0.1}),
    ("reinmax", {"balance_bias_rate": 0.1}),
]
# tokens, experts, K, the padding
SIZES = [
    (1, 1, 1, ()),
    (1, 5, 1, ()),
    (1, 3, 2, ()),
    (4, 2, 2, (0,)),
    (7, 3, 3, ()),
    (9, 6, 1, (2, 8)),
    (13, 5, 2, (0, 1, 7)),
    (3, 4, 2, (0, 1, 2)),
]


def random_layer(name, num_experts, top_k=None, **options):
    """A layer with nothing left at its initial value."""
    top_k = ROUTERS[name].min_top_k if top_k is None else top_k
    layer = MoEFeedForward(6, 10, num_experts, router=name, top_k=top_k, **options)
    router = layer.router
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    if router.expert_means is not None:
        torch.nn.init.normal_(router.expert_means.mean)
    if router.balance_bias is not None:
        torch.nn.init.normal_(router.balance_bias.bias)
    return layer


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("name", "options", "tokens", "experts", "top_k", "padding"),
    [
        (name, options, *size)
        for name, options in CASES
        for size in SIZES
        if fits(name, *size[1:3]) and not (size[2] == 1 and "renormalise" in options)
    ],
)
def test_layer_equals_naive_loop(
    name, options, training, tokens, experts, top_k, padding, monkeypatch
):
    torch.manual_seed(tokens * experts)
    layer = random_layer(name, experts, top_k, **options).train(training)
    x = torch.randn(tokens, 6, requires_grad=True)
    token_ids = torch.randint(100, (tokens,))
    mask = torch.zeros(tokens, dtype=torch.bool)
    mask[list(padding)] = True
    draws = Draws(tokens, experts, top_k) if training else None
    with monkeypatch.context() as patch:
        draws.pin(patch) if training else forbid_randomness(patch)
        y, routing = layer(x, mask if padding else None, **ids(name, token_ids))
    expected = naive_layer(layer, x, draws, padding, routing.expert_index[:, 0].tolist())
    torch.testing.assert_close(y, expected.y)
    for t, pairs in enumerate(expected.pairs):
        slots = zip(routing.expert_index[t].tolist(), routing.gate[t].tolist())
        assert dict(slot for slot in slots if slot[0] >= 0) == pytest.approx(
            {i: gate.item() for i, gate in pairs}, rel=1e-5, abs=1e-6
        )
        if pairs and ROUTERS[name].causal:
            assert routing.expert_index[t, 0] == pairs[0][0]
        assert (routing.gate[t][routing.expert_index[t] < 0] == 0).all()
    weight = torch.randn_like(y)
    # Zeros of the graph where all tokens are padding.
    naive_loss = (expected.y * weight).sum() + expected.extra(weight) + 0 * x.sum()
    assert_same_gradients(layer, (y * weight).sum(), naive_loss, [x], allow_unused=not training)


@pytest.mark.parametrize(("experts", "top_k"), [(2, 2), (5, 2), (5, 3), (5, 5)])
@pytest.mark.parametrize("padding", [(), (1, 4)])
def test_noisy_topk_load_and_importance_loss(experts, top_k, padding, monkeypatch):
    torch.manual_seed(experts + top_k)
    layer = random_layer("noisy-topk", experts, top_k)
    x = torch.randn(8, 6, requires_grad=True)
    mask = torch.zeros(8, dtype=torch.bool)
    mask[list(padding)] = True
    draws = Draws(8, experts, top_k)
    with monkeypatch.context() as patch:
        draws.pin(patch)
        routing = layer.router(x, mask)
    naive = naive_layer(layer, x, draws, padding)
    gates, load = [0.0] * experts, [0.0] * experts
    for t in sorted(set(range(8)) - set(padding)):
        for i, gate in naive.pairs[t]:
            gates[i] = gates[i] + gate
        z = [layer.router.weight[i] @ x[t] + layer.router.bias[i] for i in range(experts)]
        for i, chance in enumerate(noisy_load(layer.router, z, x[t], draws.of(t))):
            torch.testing.assert_close(routing.load[t, i], chance)
            load[i] = load[i] + chance
    statistics = RoutingStatistics.from_routing(routing)
    expected = squared_variation(gates) + squared_variation(load)
    torch.testing.assert_close(statistics.importance_loss, expected)
    assert_same_gradients(layer.router, statistics.importance_loss, expected, [x])


def test_noisy_topk_load_is_the_chance_to_be_kept_with_new_noise(monkeypatch):
    """By drawing one expert's noise again, 20,000 times."""
    torch.manual_seed(0)
    router = random_layer("noisy-topk", 4, 2).router
    z, x, noise = torch.randn(1, 4), torch.randn(1, 6), torch.randn(1, 4)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda _: noise)
        load = router.route(z, x=x).load[0]
    for i in range(4):
        again = noise.repeat(20_000, 1)
        again[:, i] = torch.randn(20_000)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randn_like", lambda _, again=again: again)
            index = router.route(z.expand(20_000, -1), x=x.expand(20_000, -1)).expert_index
        assert (index == i).any(-1).float().mean().item() == pytest.approx(
            load[i].item(), abs=0.015
        )


def test_control_variate_leaves_the_forward_pass_bit_identical(monkeypatch):
    torch.manual_seed(0)
    layer = random_layer("sparsemixer-cv", 5)
    plain = random_layer("sparsemixer", 5)
    plain.load_state_dict(layer.state_dict(), strict=False)
    x, draws = torch.randn(30, 6), Draws(30, 5, 1)
    outputs = []
    for each in (layer, plain):
        with monkeypatch.context() as patch:
            draws.pin(patch)
            outputs.append(each(x)[0])
    assert torch.equal(*outputs)


def test_hash_sends_equal_ids_to_equal_experts_and_ids_to_all():
    router = smallest("hash", num_experts=5)
    token_ids = torch.arange(10_000)
    x = torch.randn(20_000, 8)
    index = router(x, token_ids=token_ids.repeat(2)).expert_index[:, 0]
    assert torch.equal(index[:10_000], index[10_000:])
    assert torch.equal(
        index, router.eval()(x.neg(), token_ids=token_ids.repeat(2)).expert_index[:, 0]
    )
    chi_square(index[:10_000].bincount(minlength=5), torch.full((5,), 0.2))
    other = smallest("hash", num_experts=5, seed=1)(x, token_ids=token_ids.repeat(2))
    same = (other.expert_index[:10_000, 0] == index[:10_000]).float().mean()
    assert same.item() == pytest.approx(0.2, abs=0.02)


# 2. Frequencies


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


DRAWS = 40_000
# eps = 0.1 masks expert 3 at first and shows it once expert 0 is gone.
Z = torch.tensor([1.0, 0.95, 0.82, 0.78])


def masked_probs(z, eps, temperature):
    kept = ~unreachable(z.unsqueeze(0), z.max().view(1, 1), eps)[0]
    e = torch.where(kept, (z / temperature).exp(), torch.zeros(()))
    return e / e.sum()


@pytest.mark.parametrize("eps", [0.1, 1e9])
@pytest.mark.parametrize("name", SPARSEMIXERS)
def test_experts_and_evaluation_points_occur_as_they_should(name, eps):
    torch.manual_seed(1)
    estimator = ESTIMATORS[name]
    options = {} if name == "sparsemixer-1st" else {"first_order_on_argmax": False}
    router = build_router(name, embed_dim=1, num_experts=4, jitter_eps=eps, **options)
    routing = router.route(Z.expand(DRAWS, -1))
    p = masked_probs(Z, eps, estimator.temperature)
    torch.testing.assert_close(routing.sampling_probs[0], p)
    d = routing.expert_index[:, 0]
    m = routing.gate[:, 0] / p[d]
    full = m > 0.9
    torch.testing.assert_close(m, torch.where(full, 1.0, estimator.point))
    chance = estimator.chance
    joint = torch.stack([p * (1 - chance), p * chance], dim=-1)  # D and m independent
    chi_square((2 * d + full).bincount(minlength=8), joint)


@pytest.mark.parametrize("name", [n for n in SPARSEMIXERS if n != "sparsemixer-1st"])
def test_the_argmax_is_always_computed_in_full(name):
    torch.manual_seed(1)
    router = build_router(name, embed_dim=1, num_experts=4, jitter_eps=1e9)
    routing = router.route(Z.expand(5000, -1))
    d = routing.expert_index[:, 0]
    m = routing.gate[:, 0] / routing.sampling_probs[0][d]
    torch.testing.assert_close(m[d == 0], torch.ones_like(m[d == 0]))
    share = (m[d != 0] > 0.9).float().mean().item()
    assert share == pytest.approx(ESTIMATORS[name].chance, abs=0.04)


def test_uniform_quadrature_draws_the_other_point_uniformly():
    torch.manual_seed(1)
    router = build_router(
        "sparsemixer",
        embed_dim=1,
        num_experts=4,
        jitter_eps=1e9,
        quadrature="uniform",
        first_order_on_argmax=False,
    )
    routing = router.route(Z.expand(DRAWS, -1))
    p = Z.softmax(-1)
    d = routing.expert_index[:, 0]
    m = routing.gate[:, 0] / p[d]
    bins = torch.where(m > 1 - 1e-5, 10.0, m * 10).long()
    joint = p.unsqueeze(-1) * torch.tensor([0.05] * 10 + [0.5])
    chi_square((11 * d + bins).bincount(minlength=44), joint)


@pytest.mark.parametrize("eps", [0.1, 1e9])
@pytest.mark.parametrize("name", ["sparsemixer-v2", "sparsemixer-v2-star"])
def test_pairs_are_drawn_without_replacement(name, eps):
    """p~_i of all, times p~_j of what is left, with the mask of what is left."""
    torch.manual_seed(2)
    temperature = ESTIMATORS[name].temperature
    router = build_router(name, embed_dim=1, num_experts=4, top_k=2, jitter_eps=eps)
    index = router.route(Z.expand(DRAWS, -1)).expert_index
    first = masked_probs(Z, eps, temperature)
    joint = torch.zeros(4, 4)
    for i in range(4):
        left = [j for j in range(4) if j != i]
        joint[i, left] = first[i] * masked_probs(Z[left], eps, temperature)
    if eps == 1e9:
        p = (Z / temperature).softmax(-1)
        product = p.unsqueeze(1) * p / (1 - p.unsqueeze(1))
        torch.testing.assert_close(joint, product.fill_diagonal_(0.0))
    else:
        assert first[3] == 0
        assert joint[:, 3].sum() > 0
    chi_square((4 * index[:, 0] + index[:, 1]).bincount(minlength=16), joint)


@pytest.mark.parametrize("name", ["straight-through", "reinmax"])
def test_dense_routers_draw_from_the_softmax(name):
    torch.manual_seed(3)
    routing = smallest(name).route(2 * Z.expand(DRAWS, -1))
    chi_square(routing.expert_index[:, 0].bincount(minlength=4), (2 * Z).softmax(-1))
    assert routing.chosen.shape == (DRAWS, 1)
    assert torch.equal(routing.expert_index.sort(-1).values[-1], torch.arange(4))


def test_random_draws_uniformly_and_independently():
    torch.manual_seed(4)
    index = smallest("random").route(10 * Z.expand(DRAWS, -1)).expert_index[:, 0]
    pairs = 4 * index[::2] + index[1::2]
    chi_square(pairs.bincount(minlength=16), torch.full((16,), 1 / 16))


@pytest.mark.parametrize("gap", [0.0, 0.5, 1.2, 3.0])
def test_gshard_uses_its_second_expert_with_twice_its_gate(gap):
    torch.manual_seed(5)
    z = torch.tensor([0.3, 0.3 + gap, -1.0])
    second = torch.softmax(z[:2], -1)[0]
    routing = smallest("gshard", num_experts=3).route(z.expand(DRAWS, -1))
    if gap > 0:
        assert (routing.expert_index[:, 0] == 1).all()
    used = routing.expert_index[:, 1] >= 0
    torch.testing.assert_close(routing.gate[:, 0], (1 - second).expand(DRAWS))
    torch.testing.assert_close(routing.gate[:, 1], second * used)
    chance = min(1.0, 2 * second.item())
    chi_square(used.long().bincount(minlength=2), torch.tensor([1 - chance, chance]))


# 3. Properties

QUICK = settings(max_examples=25, deadline=None, derandomize=True)


@st.composite
def logit_tables(draw, min_experts=2):
    """(T, N) logits, all different."""
    tokens, experts = draw(st.integers(1, 6)), draw(st.integers(min_experts, 6))
    size = tokens * experts
    values = draw(st.lists(st.integers(-400, 400), min_size=size, max_size=size, unique=True))
    return torch.tensor(values).view(tokens, experts) / 100


def settle(name, z):
    """Without a tie of two tokens' scores, which expert choice would decide by position."""
    if not ROUTERS[name].causal:
        scores = z.double().softmax(-1).sort(0).values
        assume(len(z) == 1 or (scores.diff(dim=0) > 1e-5).all())


@pytest.mark.parametrize("name", sorted(ROUTERS))
@QUICK
@given(z=logit_tables(), seed=st.integers(0, 1000))
def test_permuted_tokens_get_permuted_results(name, z, seed):
    settle(name, z)
    torch.manual_seed(seed)
    router = smallest(name, num_experts=z.shape[1]).eval()
    tokens, order, mask = torch.arange(len(z)), torch.randperm(len(z)), torch.rand(len(z)) < 0.3
    plain = router.route(z, mask, **ids(name, tokens))
    permuted = router.route(z[order], mask[order], **ids(name, tokens[order]))
    assert torch.equal(permuted.expert_index, plain.expert_index[order])
    torch.testing.assert_close(permuted.gate, plain.gate[order])


@pytest.mark.parametrize("name", sorted(set(ROUTERS) - {"hash"}))
@QUICK
@given(z=logit_tables(), seed=st.integers(0, 1000))
def test_permuted_experts_are_chosen_permuted(name, z, seed):
    settle(name, z)
    torch.manual_seed(seed)
    experts = z.shape[1]
    top_k = max(ROUTERS[name].min_top_k, min(2, ROUTERS[name].max_top_k or 2))
    router = smallest(name, num_experts=experts, top_k=top_k).eval()
    order = torch.randperm(experts)
    plain, permuted = router.route(z), router.route(z[:, order])
    for t in range(len(z)):
        pairs = zip(plain.expert_index[t].tolist(), plain.gate[t].tolist())
        expected = {i: gate for i, gate in pairs if i >= 0}
        pairs = zip(permuted.expert_index[t].tolist(), permuted.gate[t].tolist())
        actual = {int(order[i]): gate for i, gate in pairs if i >= 0}
        assert actual == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", sorted(ROUTERS))
@QUICK
@given(z=logit_tables(), seed=st.integers(0, 1000), training=st.booleans(), full=st.booleans())
def test_experts_of_a_token_are_distinct_and_padding_gets_none(name, z, seed, training, full):
    torch.manual_seed(seed)
    experts = z.shape[1]
    top_k = experts if full and ROUTERS[name].max_top_k is None else ROUTERS[name].min_top_k
    router = smallest(name, num_experts=experts, top_k=top_k).train(training)
    mask = torch.rand(len(z)) < 0.4
    routing = router.route(z, mask, **ids(name, torch.arange(len(z))))
    assert routing.expert_index.shape == routing.gate.shape
    for t, row in enumerate(routing.expert_index.tolist()):
        used = [i for i in row if i >= 0]
        assert len(set(used)) == len(used)
        assert all(i < experts for i in used)
        if mask[t]:
            assert not used
            assert (routing.gate[t] == 0).all()
            if routing.mean_gate is not None:
                assert (routing.mean_gate[t] == 0).all()
        elif ROUTERS[name].causal:
            assert used
    if not ROUTERS[name].causal:
        share = math.ceil(top_k * int((~mask).sum()) / experts)
        assert ((routing.expert_index >= 0).sum(0) == share).all()


@pytest.mark.parametrize("name", SPARSEMIXERS)
@settings(QUICK, max_examples=40)
@given(
    z=logit_tables(),
    seed=st.integers(0, 1000),
    training=st.booleans(),
    eps=st.sampled_from([0.0, 0.05, 0.1, 0.3]),
)
def test_masked_experts_are_never_chosen(name, z, seed, training, eps):
    torch.manual_seed(seed)
    top_k = 1 if ROUTERS[name].max_top_k == 1 else 2
    router = smallest(name, num_experts=z.shape[1], top_k=top_k, jitter_eps=eps).train(training)
    index = router.route(z).expert_index
    for k in range(top_k):
        left = z.scatter(1, index[:, :k], float("-inf"))
        for t in range(len(z)):
            d = int(index[t, k])
            top, chosen = float(left[t].max()), float(left[t, d])
            assert top - chosen <= 2 * eps * max(abs(chosen), top) + 1e-5


@QUICK
@given(experts=st.integers(2, 5), tokens=st.integers(1, 5), seed=st.integers(0, 1000))
def test_topk_of_all_experts_is_the_dense_sum(experts, tokens, seed):
    torch.manual_seed(seed)
    layer = random_layer("topk", experts, experts).eval()
    x = torch.randn(tokens, 6)
    y, routing = layer(x)
    torch.testing.assert_close(routing.gate.sum(-1), torch.ones(tokens))
    p = (x @ layer.router.weight.t() + layer.router.bias).softmax(-1)
    dense = [
        sum(p[t, i] * expert_output(layer.experts, i, x[t]) for i in range(experts))
        for t in range(tokens)
    ]
    torch.testing.assert_close(y, torch.stack(dense))


@QUICK
@given(z=logit_tables(), seed=st.integers(0, 1000), training=st.booleans())
def test_renormalised_gates_sum_to_one(z, seed, training):
    torch.manual_seed(seed)
    for name, options in (("topk", {"renormalise": True, "top_k": 2}), ("noisy-topk", {})):
        gate = smallest(name, num_experts=z.shape[1], **options).train(training).route(z).gate
        torch.testing.assert_close(gate.sum(-1), torch.ones(len(z)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_ties_and_extreme_logits_give_finite_gates_and_gradients(name, training):
    torch.manual_seed(0)
    top_k = max(ROUTERS[name].min_top_k, min(3, ROUTERS[name].max_top_k or 3))
    router = smallest(name, top_k=top_k).train(training)
    rows = [[0.0] * 4, [-2.0] * 4, [1e30, 0, 0, -1e30], [-1e30] * 4, [1e-30, 0, -1e-30, 0]]
    z = torch.tensor(rows).repeat(20, 1).requires_grad_()
    routing = router.route(z, **ids(name, torch.arange(100)))
    assert routing.gate.isfinite().all()
    for row in routing.expert_index.tolist():
        used = [i for i in row if i >= 0]
        assert len(set(used)) == len(used)
    loss = routing.gate.sum() + RoutingStatistics.from_routing(routing).importance_loss
    if loss.requires_grad:
        (gradient,) = torch.autograd.grad(loss, z)
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("name", sorted(ROUTERS))
@pytest.mark.parametrize("tokens", [0, 3])
def test_importance_loss_without_tokens_is_zero(name, tokens):
    torch.manual_seed(0)
    layer = random_layer(name, 4)
    x, token_ids = torch.randn(tokens, 6), torch.arange(tokens)
    y, routing = layer(x, torch.ones(tokens, dtype=torch.bool), **ids(name, token_ids))
    loss = RoutingStatistics.from_routing(routing).importance_loss
    assert loss == 0
    (y.sum() + loss).backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert (parameter.grad == 0).all()


# 4. Expectations by enumerating all draws


@pytest.fixture
def in_double(monkeypatch):
    """Routers compute in float64 where they would cast to float32."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)


def enumerate_draws(name, z, monkeypatch, nodes=((0.5, 1.0),), **options):
    """The routing of all draws, one a row, and the probability of each row.

    nodes: (point, weight) of the quadrature that takes the place of m ~ U(0, 1).
    """
    experts = len(z)
    router = build_router(name, embed_dim=1, num_experts=experts, jitter_eps=1e9, **options)
    estimator = ESTIMATORS.get(name)
    p = (z.detach() / (estimator.temperature if estimator else 1.0)).softmax(-1)
    chance = estimator.chance if estimator else 1.0
    rows = []
    for d in range(experts):
        # Coins just below and just above the chance of m = 1.
        rows.append((d, chance - 1e-6, 0.5, p[d] * chance))
        if chance < 1:
            rows += [(d, chance + 1e-6, m, p[d] * (1 - chance) * w) for m, w in nodes]
    choice = torch.tensor([row[0] for row in rows])
    # Gumbel-max takes the expert whose exponential is nearest to 0.
    exponential = torch.ones(len(rows), experts).scatter(1, choice.unsqueeze(-1), 1e-30)
    coins = iter([torch.tensor([[row[c]] for row in rows]).to(z) for c in (1, 2)])
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "exponential_", lambda self: self.copy_(exponential))
        patch.setattr(torch, "rand_like", lambda _: next(coins))
        routing = router.route(z.expand(len(rows), -1))
    assert torch.equal(routing.expert_index[:, 0], choice)
    return routing, torch.stack([row[3] for row in rows])


def expected_gradient(name, z, outputs, f, monkeypatch, means=None, nodes=((0.5, 1.0),), **options):
    """The estimator's mean gradient to the logits."""
    z = z.clone().requires_grad_()
    routing, probability = enumerate_draws(name, z, monkeypatch, nodes, **options)
    h = (routing.gate.unsqueeze(-1) * outputs[routing.expert_index]).sum(1)
    if means is not None:
        h = h + routing.mean_gate @ means
    return torch.autograd.grad((probability * f(h)).sum(), z)[0]


def exact_gradient(z, outputs, f, temperature=1.0, grad_1=True):
    """d/dz of E[f(p_D E_D)], without the gradient through the gate if grad_1 is False."""
    z = z.clone().requires_grad_()
    p = (z / temperature).softmax(-1)
    gate = p if grad_1 else p.detach()
    return torch.autograd.grad((p * f(gate.unsqueeze(-1) * outputs)).sum(), z)[0]


def problem(seed, experts=4, width=3, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(experts, generator=generator, dtype=torch.double)
    return z, scale * torch.randn(experts, width, generator=generator, dtype=torch.double)


def polynomial(degree, seed, width=3):
    generator = torch.Generator().manual_seed(100 + seed)
    linear = torch.randn(width, generator=generator, dtype=torch.double)
    matrix = torch.randn(width, width, generator=generator, dtype=torch.double)
    cubic = torch.randn(width, width, width, generator=generator, dtype=torch.double)

    def f(h):
        value = 3.0 + h @ linear
        if degree >= 2:
            value = value + torch.einsum("ri,rj,ij->r", h, h, matrix)
        if degree >= 3:
            value = value + torch.einsum("ri,rj,rk,ijk->r", h, h, h, cubic)
        if degree >= 4:
            value = value + h.square().sum(-1).square()
        return value

    return f


def smooth(h):
    """No polynomial, with all derivatives at 0."""
    weights = torch.linspace(0.5, 1.5, h.shape[-1], dtype=h.dtype)
    return torch.exp(0.7 * (h * weights).sum(-1)) + torch.sin(h + 0.3).prod(-1)


NO_OVERRIDE = {"first_order_on_argmax": False}
# router, options, the highest degree of f for which its mean is the exact gradient
DEGREES = [
    ("sparsemixer-1st", {}, 1),
    ("sparsemixer", NO_OVERRIDE, 2),
    ("sparsemixer-v2-star", NO_OVERRIDE, 3),
    ("straight-through", {}, 1),
    ("reinmax", {}, 2),
]


def relative_error(value, wanted):
    return ((value - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("experts", [1, 2, 5])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "options", "highest"), DEGREES)
def test_exact_up_to_a_degree_and_not_beyond(
    name, options, highest, seed, experts, in_double, monkeypatch
):
    z, outputs = problem(seed, experts)
    temperature = ESTIMATORS[name].temperature if name in ESTIMATORS else 1.0
    for degree in range(1, highest + 2):
        f = polynomial(degree, seed)
        exact = exact_gradient(z, outputs, f, temperature)
        mean = expected_gradient(name, z, outputs, f, monkeypatch, **options)
        if degree <= highest:
            torch.testing.assert_close(mean, exact, rtol=1e-8, atol=1e-9)
        elif experts > 1:
            assert relative_error(mean, exact) > 1e-3


@pytest.mark.parametrize("seed", range(4))
def test_v2_estimates_the_gradient_of_the_choice_alone(seed, in_double, monkeypatch):
    z, outputs = problem(seed)
    f = polynomial(3, seed)
    grad_0 = exact_gradient(z, outputs, f, grad_1=False)
    mean = expected_gradient("sparsemixer-v2", z, outputs, f, monkeypatch, **NO_OVERRIDE)
    torch.testing.assert_close(mean, grad_0, rtol=1e-8, atol=1e-9)
    assert relative_error(mean, exact_gradient(z, outputs, f)) > 0.01
    quartic = polynomial(4, seed)
    mean = expected_gradient("sparsemixer-v2", z, outputs, quartic, monkeypatch, **NO_OVERRIDE)
    assert relative_error(mean, exact_gradient(z, outputs, quartic, grad_1=False)) > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_uniform_quadrature_is_exact_for_any_f(seed, in_double, monkeypatch):
    z, outputs = problem(seed)
    points, weights = np.polynomial.legendre.leggauss(24)
    nodes = [(float(m + 1) / 2, float(w) / 2) for m, w in zip(points, weights)]
    exact = exact_gradient(z, outputs, smooth)
    uniform = {**NO_OVERRIDE, "quadrature": "uniform"}
    mean = expected_gradient("sparsemixer", z, outputs, smooth, monkeypatch, nodes=nodes, **uniform)
    torch.testing.assert_close(mean, exact, rtol=1e-8, atol=1e-9)
    mid_point = expected_gradient("sparsemixer", z, outputs, smooth, monkeypatch, **NO_OVERRIDE)
    assert relative_error(mid_point, exact) > 1e-3


@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        ("sparsemixer-1st", {}, 1),
        ("sparsemixer", NO_OVERRIDE, 2),
        ("sparsemixer-v2-star", NO_OVERRIDE, 3),
        ("straight-through", {}, 1),
        ("reinmax", {}, 2),
    ],
)
def test_error_falls_with_the_scale_of_h_at_the_order(name, options, order, in_double, monkeypatch):
    z, outputs = problem(7)
    temperature = ESTIMATORS[name].temperature if name in ESTIMATORS else 1.0
    scales = [2.0**-n for n in range(4, 9)]
    errors = []
    for scale in scales:
        exact = exact_gradient(z, scale * outputs, smooth, temperature)
        mean = expected_gradient(name, z, scale * outputs, smooth, monkeypatch, **options)
        errors.append(relative_error(mean, exact))
    slope = np.polyfit(np.log(scales), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("seed", range(3))
def test_straight_through_misses_a_quadratic_by_its_known_error(seed, in_double, monkeypatch):
    """exact - mean = sum_i sum_j p_j (h_i - h_j)' A (h_i - h_j) dp_i for f(h) = h' A h."""
    z, outputs = problem(seed)
    matrix = torch.randn(3, 3, dtype=torch.double)
    matrix = matrix + matrix.t()

    def f(h):
        return torch.einsum("ri,ij,rj->r", h, matrix, h)

    p = z.softmax(-1)
    h = p.unsqueeze(-1) * outputs
    error = torch.zeros(4, dtype=torch.double)
    for i in range(4):
        for j in range(4):
            gap = h[i] - h[j]
            for n in range(4):  # dp_i / dz_n = p_i ([i = n] - p_n)
                error[n] += p[j] * (gap @ matrix @ gap) * p[i] * (float(i == n) - p[n])
    mean = expected_gradient("straight-through", z, outputs, f, monkeypatch)
    exact = exact_gradient(z, outputs, f)
    torch.testing.assert_close(exact - mean, error, rtol=1e-8, atol=1e-9)
    assert relative_error(mean, exact) > 1e-3


@pytest.mark.parametrize("options", [NO_OVERRIDE, {}])
@pytest.mark.parametrize("seed", range(3))
def test_bias_of_the_control_variate(seed, options, in_double, monkeypatch):
    """Relative to sparsemixer it is 2 sum_i p_i ((ubar - u_i).m_i) dp_i, and 0 for linear f.

    A draw D adds sum_i p_i 2 u_D.m_i dp_i - 2 u_D.m_D dp_D. Its mean over D is the first sum with
    ubar = sum_D p_D u_D in place of u_D, minus 2 sum_i p_i u_i.m_i dp_i.
    """
    z, outputs = problem(seed)
    means = outputs + 0.5 * torch.randn(outputs.shape, dtype=torch.double)
    p = z.softmax(-1)

    def gradient(h):
        h = h.clone().requires_grad_()
        return torch.autograd.grad(smooth(h).sum(), h)[0]

    h = p.unsqueeze(-1) * outputs
    u = (gradient(h) + gradient(h / 2)) / 2
    if not options:
        best = z.argmax()
        u[best] = gradient(h)[best]
    mean_u = sum(p[d] * u[d] for d in range(4))
    bias = torch.zeros(4, dtype=torch.double)
    for i in range(4):
        for n in range(4):
            bias[n] += 2 * p[i] * ((mean_u - u[i]) @ means[i]) * p[i] * (float(i == n) - p[n])
    cv = expected_gradient("sparsemixer-cv", z, outputs, smooth, monkeypatch, means, **options)
    plain = expected_gradient("sparsemixer", z, outputs, smooth, monkeypatch, **options)
    torch.testing.assert_close(cv - plain, bias, rtol=1e-8, atol=1e-9)
    assert bias.norm() > 1e-3 * plain.norm()

    linear = polynomial(1, seed)
    cv = expected_gradient("sparsemixer-cv", z, outputs, linear, monkeypatch, means, **options)
    torch.testing.assert_close(cv, exact_gradient(z, outputs, linear), rtol=1e-8, atol=1e-9)


def test_control_variate_has_no_variance_where_means_and_f_are_exact(in_double, monkeypatch):
    z, outputs = problem(0)
    f = polynomial(1, 0)
    exact = exact_gradient(z, outputs, f)
    spread = {}
    for name in ("sparsemixer", "sparsemixer-cv"):
        z_grad = z.clone().requires_grad_()
        routing, _ = enumerate_draws(name, z_grad, monkeypatch)
        h = (routing.gate.unsqueeze(-1) * outputs[routing.expert_index]).sum(1)
        if routing.mean_gate is not None:
            h = h + routing.mean_gate @ outputs
        rows = [torch.autograd.grad(v, z_grad, retain_graph=True)[0] for v in f(h)]
        spread[name] = max(relative_error(row, exact) for row in rows)
    assert spread["sparsemixer-cv"] < 1e-9
    assert spread["sparsemixer"] > 0.1


# 5. The code released with GRIN, as transformers has it


@pytest.fixture(scope="module")
def phimoe():
    with pytest.MonkeyPatch.context() as patch:
        # transformers imports it where it is installed, and it may not fit this torch.
        patch.setitem(sys.modules, "torchaudio", None)
        return pytest.importorskip("transformers.models.phimoe.modeling_phimoe")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("eps", [0.01, 0.1, 1e4])
@pytest.mark.parametrize("shift", [0.0, -5.0])
def test_v2_equals_the_router_of_phimoe(phimoe, training, eps, shift, monkeypatch):
    """Same experts, multipliers and gradients for the same noise.

    They differ in one number: theirs has 0.3333 where the paper and we have 1/3 (their 0.3333 +
    0.6667 is 1), so a third of a gate is off by a factor of 0.9999. Their m scales the gate only
    in the forward pass, as ours. (Algorithm 1 as printed also keeps m out of the expert's
    gradient; the code does not, nor do we.) They take m = 1 where rand > 0.75, we where
    rand < 0.25. Ties apart, nothing else: their second mask reads the logit of the expert that is
    already drawn, but that one is -inf by then.
    """
    torch.manual_seed(0)
    tokens, experts = 400, 6
    z = (torch.randn(tokens, experts) + shift).requires_grad_()
    noise = torch.empty(2, tokens, experts).exponential_()
    coins = torch.rand(2, tokens, 1)
    router = build_router(
        "sparsemixer-v2", embed_dim=4, num_experts=experts, top_k=2, jitter_eps=eps
    ).train(training)

    def pinned(run, coins):
        noises, coins = iter(noise), iter(coins)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "exponential_", lambda self: self.copy_(next(noises)))
            patch.setattr(torch.Tensor, "uniform_", lambda self: self)
            patch.setattr(torch, "rand_like", lambda _: next(coins))
            return run()

    routing = pinned(lambda: router.route(z), coins)
    theirs, index = pinned(lambda: phimoe.sparsemixer(z, eps, training, top_k=2), 1 - coins)
    assert torch.equal(routing.expert_index, index)
    torch.testing.assert_close(routing.gate, theirs, rtol=2e-4, atol=0.0)
    weight = torch.randn(tokens, 2)
    (ours,) = torch.autograd.grad((routing.gate * weight).sum(), z)
    (wanted,) = torch.autograd.grad((theirs * weight).sum(), z)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
    if training and eps > 0.01:
        assert (routing.expert_index[:, 0] != z.argmax(-1)).any()


# 6. What is learnt without a gradient, and output masking

BIASED = sorted(name for name, router in ROUTERS.items() if router.takes_balance_bias)


@pytest.mark.parametrize("name", BIASED)
def test_balance_bias_moves_by_the_sign_of_the_missing_load(name):
    torch.manual_seed(0)
    layer = random_layer(name, 5, balance_bias_rate=0.25)
    expected = layer.router.balance_bias.bias.tolist()
    for _ in range(3):
        load = [0] * 5
        for _ in range(2):  # batches of one update
            x, mask = torch.randn(11, 6), torch.rand(11) < 0.3
            before = layer.router.balance_bias.bias.clone()
            _, routing = layer(x, mask)
            assert torch.equal(layer.router.balance_bias.bias, before)
            for row in routing.chosen.tolist():
                for i in row:
                    if i >= 0:
                        load[i] += 1
        layer.end_update()
        for i in range(5):
            missing = sum(load) / 5 - load[i]
            expected[i] += 0.25 * ((missing > 0) - (missing < 0))
        assert layer.router.balance_bias.bias.tolist() == pytest.approx(expected, abs=1e-5)
    layer.end_update()  # nothing routed: nothing to balance
    assert layer.router.balance_bias.bias.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", BIASED)
def test_balance_bias_balances(name):
    torch.manual_seed(0)
    layer = MoEFeedForward(
        6, 4, 4, router=name, top_k=ROUTERS[name].min_top_k, balance_bias_rate=0.05
    )
    with torch.no_grad():
        layer.router.bias.copy_(torch.tensor([2.0, 0.0, 0.0, -2.0]))
    x = torch.randn(200, 6)
    shares = []
    for _ in range(150):
        _, routing = layer(x)
        chosen = routing.chosen[routing.chosen >= 0]
        shares.append(chosen.bincount(minlength=4) / len(chosen))
        layer.end_update()
    assert shares[0].max() > 0.45
    late = torch.stack(shares[-20:]).mean(0)
    assert late.max() < 0.35
    assert late.min() > 0.15


def test_bias_of_the_choice_does_not_touch_the_gate_of_topk():
    torch.manual_seed(0)
    router = build_router(
        "topk", embed_dim=4, num_experts=4, top_k=2, jitter_eps=0.0, balance_bias_rate=0.1
    )
    router.balance_bias.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 100.0]))
    z = torch.tensor([[3.0, 2.0, 1.0, -1.0]])
    routing = router.route(z)
    assert sorted(routing.expert_index[0].tolist()) == [0, 3]
    torch.testing.assert_close(routing.gate, z.softmax(-1).gather(1, routing.expert_index))
    torch.testing.assert_close(routing.probs, z.softmax(-1))


WITH_MEANS = ["default-moe", "sparsemixer-cv"]


@pytest.mark.parametrize("decay", [0.0, 0.6, 0.99])
@pytest.mark.parametrize("name", WITH_MEANS)
@pytest.mark.parametrize("backend", ["sorted", "loop"])
def test_running_means_by_their_formula(name, decay, backend):
    torch.manual_seed(0)
    layer = MoEFeedForward(6, 10, 5, router=name, mean_decay=decay, backend=backend)
    torch.nn.init.normal_(layer.router.weight)
    means, updates = torch.zeros(5, 6), [0] * 5
    for step in range(4):
        got = [[] for _ in range(5)]
        for _ in range(2):
            x, mask = torch.randn(1 + 2 * step, 6), torch.rand(1 + 2 * step) < 0.3
            _, routing = layer(x, mask)
            for t, i in enumerate(routing.expert_index[:, 0].tolist()):
                if i >= 0:
                    got[i].append(expert_output(layer.experts, i, x[t]).detach())
        torch.testing.assert_close(layer.router.expert_means.mean, means)
        layer.end_update()
        for i in range(5):
            if got[i]:
                updates[i] += 1
                rate = max(1 / updates[i], 1 - decay)
                means[i] += rate * (sum(got[i]) / len(got[i]) - means[i])
        torch.testing.assert_close(layer.router.expert_means.mean, means)
    assert layer.router.expert_means.updates.tolist() == updates


ADAPTIVE = [("topk", {}), *((name, {}) for name in WITH_MEANS)]


def adaptive_layer(name):
    layer = random_layer(name, 4, balance_bias_rate=0.1)
    layer(torch.randn(9, 6))
    layer.end_update()
    layer(torch.randn(5, 6))  # in the middle of an update
    return layer


def buffers(layer):
    return {name: value.clone() for name, value in layer.router.named_buffers()}


@pytest.mark.parametrize(("name", "options"), ADAPTIVE)
@pytest.mark.parametrize("mode", ["no_grad", "inference", "evaluation", "padding", "routed"])
def test_only_a_training_forward_of_the_layer_is_observed(name, options, mode):
    torch.manual_seed(0)
    layer = adaptive_layer(name)
    x, before = torch.randn(7, 6), buffers(layer)
    if mode == "no_grad":
        with torch.no_grad():
            layer(x)
    elif mode == "inference":
        with torch.inference_mode():
            layer(x)
    elif mode == "evaluation":
        layer.eval()(x)
        layer.train()
    elif mode == "padding":
        layer(x, torch.ones(7, dtype=torch.bool))
    else:
        layer.router(x)
    for key, value in buffers(layer).items():
        assert torch.equal(value, before[key]), key
    layer(x)
    assert any(not torch.equal(value, before[key]) for key, value in buffers(layer).items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "options"), ADAPTIVE)
def test_buffers_stay_float32_in_half_precision(name, options, dtype):
    torch.manual_seed(0)
    layer = adaptive_layer(name).to(dtype)
    assert all(value.dtype == torch.float32 for value in buffers(layer).values())
    layer(torch.randn(7, 6, dtype=dtype))
    layer.end_update()
    assert all(value.dtype == torch.float32 for value in buffers(layer).values())
    assert layer.router.weight.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "options"), ADAPTIVE)
def test_a_cast_to_half_precision_rounds_no_buffer(name, options, dtype):
    torch.manual_seed(0)
    layer = adaptive_layer(name)
    for part in (layer.router.balance_bias, layer.router.expert_means):
        if part is not None:
            part.token_count += 70_001  # half precision ends at 65,504
    before = buffers(layer)
    layer.to(dtype)
    for key, value in buffers(layer).items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, msg=key)


@pytest.mark.parametrize(("name", "options"), ADAPTIVE)
def test_state_dict_holds_what_was_learnt_and_collected(name, options):
    torch.manual_seed(0)
    layer = adaptive_layer(name)
    copy = random_layer(name, 4, balance_bias_rate=0.1)
    copy.load_state_dict(layer.state_dict())
    for each in (layer, copy):
        each.end_update()
    for key, value in buffers(copy).items():
        assert torch.equal(value, buffers(layer)[key]), key
    x = torch.randn(8, 6)
    assert torch.equal(copy.eval()(x)[0], layer.eval()(x)[0])


@pytest.mark.parametrize(("name", "options"), ADAPTIVE)
def test_two_workers_agree_with_one(name, options):
    """all_reduce sums over workers; the result is that of one worker with both batches."""
    torch.manual_seed(0)
    start = adaptive_layer(name)
    start.end_update()
    whole, *workers = (random_layer(name, 4, balance_bias_rate=0.1) for _ in range(3))
    for each in (whole, *workers):
        each.load_state_dict(start.state_dict())
        each.router.jitter_eps = 0.0  # no choice is left to chance
    batches = torch.randn(2, 7, 6)
    for worker, batch in zip(workers, batches):
        worker(batch)
        whole(batch)
    sums = []
    workers[0].end_update(lambda value: sums.append(value.clone()))  # takes a copy, adds nothing
    workers[0].load_state_dict(start.state_dict())
    workers[0](batches[0])
    others = iter(sums)
    workers[1].end_update(lambda value: value.add_(next(others)))
    whole.end_update()
    for key, value in buffers(workers[1]).items():
        torch.testing.assert_close(value, buffers(whole)[key], msg=key)


@pytest.mark.parametrize(("name", "top_k"), [("topk", 2), ("switch", 1), ("default-moe", 2)])
def test_output_masking_drops_slots_and_scales_the_rest(name, top_k):
    torch.manual_seed(0)
    layer = MoEFeedForward(6, 4, 4, router=name, top_k=top_k, jitter_eps=1e-7, output_masking=0.3)
    x = torch.randn(8000, 6)
    mask = torch.arange(8000) < 100
    y, routing = layer(x, mask)
    plain = layer.router(x, mask)
    assert torch.equal(routing.expert_index, plain.expert_index)
    kept = routing.gate != 0
    torch.testing.assert_close(routing.gate, plain.gate / 0.7 * kept, rtol=1e-5, atol=1e-6)
    assert not kept[:100].any()
    assert (y[:100] == 0).all()
    # Each slot by itself.
    cells = (kept[100:].long() * torch.tensor([2, 1])[:top_k]).sum(-1)
    chance = torch.tensor([0.3, 0.7]) if top_k == 1 else torch.tensor([0.09, 0.21, 0.21, 0.49])
    if top_k == 1:
        cells = cells // 2
    chi_square(cells.bincount(minlength=2**top_k), chance)
    for t in range(100, 140):
        row = torch.zeros(6)
        for k in range(top_k):
            i = int(routing.expert_index[t, k])
            if kept[t, k]:
                row = row + plain.gate[t, k] / 0.7 * expert_output(layer.experts, i, x[t])
        torch.testing.assert_close(y[t], row)
    layer.eval()
    y, _ = layer(x)
    layer.output_masking = 0.0
    assert torch.equal(layer(x)[0], y)


def test_a_dropped_output_gives_no_gradient():
    torch.manual_seed(0)
    layer = MoEFeedForward(6, 4, 3, router="switch", jitter_eps=0.0, output_masking=0.5)
    x = torch.randn(40, 6, requires_grad=True)
    y, routing = layer(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    dropped = routing.gate[:, 0] == 0
    assert 0 < dropped.sum() < 40
    assert (gradient[dropped] == 0).all()
    assert (gradient[~dropped].abs().sum(-1) > 0).all()


# 7. Errors


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
            for name in ("hash", "random", "expert-choice", "noisy-topk")
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
