"""All routers against naive loops, frequencies and properties."""

import math

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
from support.routers import chi_square, random_layer

from fairseq_sparsemixer.moe import ROUTERS, RoutingStatistics, build_router
from fairseq_sparsemixer.moe.routers.sparsemixer import unreachable

COMPOSED = [
    dict(zip(("choice", "gate", "estimator"), factors))
    for factors in (
        ("argmax", "full", "grad-1"),
        ("argmax", "masked", "grad-1"),
        ("argmax", "one", "first-order"),
        ("jittered-argmax", "full", "grad-1"),
        ("jittered-argmax", "masked", "grad-1"),
        ("jittered-argmax", "one", "first-order"),
        ("masked-sample", "masked", "grad-1"),
        ("masked-sample", "full", "grad-1"),
        ("masked-sample", "full", "first-order"),
        ("masked-sample", "full", "midpoint"),
        ("masked-sample", "one", "first-order"),
        ("masked-sample", "one", "midpoint"),
        ("full-sample", "full", "grad-1"),
        ("full-sample", "full", "midpoint"),
        ("full-sample", "one", "midpoint"),
    )
]
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
    *((name, {"gate": "full"}) for name in [*SPARSEMIXERS, "hash"]),
    ("sparsemixer", {"gate": "full", "first_order_on_argmax": False}),
    ("sparsemixer", {"gate": "full", "quadrature": "uniform"}),
    ("sparsemixer", {"gate": "full", "balance_bias_rate": 0.1}),
    ("sparsemixer", {"gate": "full", "jitter_eps": 0.0}),
    ("sparsemixer-v2-star", {"gate": "full", "first_order_on_argmax": False}),
    *(("composed", {**composed, "balance_bias_rate": 0.1}) for composed in COMPOSED),
    ("composed", {"gate": "one", "first_order_on_argmax": False}),
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


def test_hash_is_the_same_in_every_version():
    """What a model has learnt depends on it."""
    expected = {0: [824515495, 1722258072, 1605816901], 7: [792170672, 1699764075, 1981034902]}
    for seed, numbers in expected.items():
        router = smallest("hash", num_experts=5, seed=seed)
        assert router.hash(torch.arange(3)).tolist() == numbers


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


BY_NUMBER = {"hash", "language"}
"""Routers that choose by the number of an expert: a permutation of the experts changes them."""


@pytest.mark.parametrize("name", sorted(set(ROUTERS) - BY_NUMBER))
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
    eps=st.sampled_from([1e-6, 0.05, 0.1, 0.3]),
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


def test_expert_choice_takes_the_first_of_tokens_that_it_likes_as_much():
    """On every machine, though sorting may leave the order of equals open."""
    chosen = build_router("expert-choice", embed_dim=6, num_experts=4).route(torch.zeros(200, 4))
    for expert in range(4):
        assert chosen.expert_index.eq(expert).any(-1).nonzero()[:, 0].tolist() == list(range(50))


def test_expert_choice_gives_all_the_same_load_however_little_they_are_liked():
    """A probability may be 0 in float32; padding alone is never taken."""
    z = torch.tensor([0.0, -200.0]).expand(6, 2)
    padding = torch.tensor([False, True, False, False, True, False])
    routing = build_router("expert-choice", embed_dim=6, num_experts=2).route(z, padding)
    assert not routing.probs[:, 1].any()
    assert [routing.expert_index.eq(expert).sum() for expert in range(2)] == [2, 2]
    assert (routing.expert_index[padding] == -1).all()


@pytest.mark.parametrize("name", ["straight-through", "reinmax"])
def test_dense_routers_list_the_experts_that_were_not_chosen_in_their_order(name):
    """On every machine: outputs of all experts are summed up in it, equal to the last bit."""
    torch.manual_seed(0)
    index = build_router(name, embed_dim=6, num_experts=40).train().route(torch.randn(50, 40))
    for chosen, *others in index.expert_index.tolist():
        assert others == [expert for expert in range(40) if expert != chosen]


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
