"""Gates that are not the distribution that the expert is drawn from, and composed routers."""

import numpy as np
import pytest
import torch
from support.enumeration import (
    NO_MASK,
    enumerate_draws,
    masked_softmax,
    polynomial,
    problem,
    relative_error,
    smooth,
)
from support.reference_routers import ESTIMATORS, SPARSEMIXERS

from fairseq_sparsemixer.moe import ROUTERS, MoEFeedForward, build_router
from fairseq_sparsemixer.moe.routers import sparsemixer

NO_OVERRIDE = {"first_order_on_argmax": False}
MASKS = [0.1, NO_MASK]


def logits_and_outputs(seed, jitter_eps):
    """A problem of four experts, of which the mask of 0.1 hides one."""
    z, outputs = problem(seed)
    if jitter_eps != NO_MASK:
        z = 2 + 0.1 * z
        z[1] = 1.0
        assert (masked_softmax(z, jitter_eps) == 0).tolist() == [False, True, False, False]
    return z, outputs


def gates(kind, z, masked, temperature=1.0):
    """(N,) the gate of each expert."""
    if kind == "one":
        return torch.ones_like(z)
    return masked if kind == "masked" else (z / temperature).softmax(-1)


def exact_gradient(z, outputs, f, jitter_eps, gate, temperature=1.0, terms=(True, True)):
    """d/dz sum_i q_i f(g_i E_i) with q the masked softmax; its term grad_1, grad_0 or both."""
    z = z.clone().requires_grad_()
    kept = masked_softmax(z.detach(), jitter_eps) > 0
    q = (z / temperature).masked_fill(~kept, float("-inf")).softmax(-1)
    g = gates(gate, z, q, temperature)
    g, q = (g if terms[0] else g.detach()), (q if terms[1] else q.detach())
    return torch.autograd.grad((q * f(g.unsqueeze(-1) * outputs)).sum() + 0 * z.sum(), z)[0]


def mean_gradient(name, z, outputs, f, monkeypatch, chance, temperature=1.0, **options):
    """The estimator's mean gradient to the logits."""
    z = z.clone().requires_grad_()
    eps = options.get("jitter_eps", NO_MASK)
    kept = masked_softmax(z.detach(), eps) > 0
    if options.get("choice") == "full-sample":
        kept = kept | True
    q = (z.detach() / temperature).masked_fill(~kept, float("-inf")).softmax(-1)
    routing, probability = enumerate_draws(name, z, monkeypatch, q, chance, **options)
    h = routing.gate * outputs[routing.expert_index[:, 0]]
    return torch.autograd.grad((probability * f(h)).sum(), z)[0]


# Router, options, the highest degree of f for which the mean is exact, the terms that it estimates.
FULL_GATES = [
    ("sparsemixer-1st", {}, 1, (True, True)),
    ("sparsemixer", NO_OVERRIDE, 2, (True, True)),
    ("sparsemixer-v2", NO_OVERRIDE, 3, (False, True)),
    ("sparsemixer-v2-star", NO_OVERRIDE, 3, (True, True)),
]


@pytest.mark.parametrize("jitter_eps", MASKS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "options", "highest", "terms"), FULL_GATES)
def test_the_full_gate_is_exact_up_to_a_degree_and_not_beyond(
    name, options, highest, terms, seed, jitter_eps, in_double, monkeypatch
):
    estimator = ESTIMATORS[name]
    # The mask is of z, the probabilities are of z over the temperature.
    z, outputs = logits_and_outputs(seed, jitter_eps)
    for degree in range(1, highest + 2):
        f = polynomial(degree, seed)
        exact = exact_gradient(z, outputs, f, jitter_eps, "full", estimator.temperature, terms)
        mean = mean_gradient(
            *(name, z, outputs, f, monkeypatch, estimator.chance, estimator.temperature),
            **{"jitter_eps": jitter_eps, "gate": "full", **options},
        )
        if degree <= highest:
            torch.testing.assert_close(mean, exact, rtol=1e-8, atol=1e-9)
        else:
            assert relative_error(mean, exact) > 1e-4
        if jitter_eps != NO_MASK:
            other = exact_gradient(
                z, outputs, f, jitter_eps, "masked", estimator.temperature, terms
            )
            assert relative_error(exact, other) > 0.01


@pytest.mark.parametrize("jitter_eps", MASKS)
@pytest.mark.parametrize("seed", range(3))
def test_uniform_quadrature_with_the_full_gate_is_exact_for_any_f(
    seed, jitter_eps, in_double, monkeypatch
):
    z, outputs = logits_and_outputs(seed, jitter_eps)
    points, weights = np.polynomial.legendre.leggauss(24)
    nodes = [(float(m + 1) / 2, float(w) / 2) for m, w in zip(points, weights)]
    options = {**NO_OVERRIDE, "gate": "full", "jitter_eps": jitter_eps}
    mean = mean_gradient(
        *("sparsemixer", z, outputs, smooth, monkeypatch, 0.5),
        **{"nodes": nodes, "quadrature": "uniform", **options},
    )
    exact = exact_gradient(z, outputs, smooth, jitter_eps, "full")
    torch.testing.assert_close(mean, exact, rtol=1e-8, atol=1e-9)
    mid_point = mean_gradient("sparsemixer", z, outputs, smooth, monkeypatch, 0.5, **options)
    assert relative_error(mid_point, exact) > 1e-4


def test_at_the_argmax_the_override_takes_both_terms_in_full():
    """m = 1, dp_D + p_D dlog p~_D; else 2 dp_D at m = 1 and 2 p_D dlog p~_D at m = 1/2."""
    torch.manual_seed(0)
    z = torch.tensor([1.0, 0.95, 0.9, 0.2]).repeat(60, 1).requires_grad_()
    router = build_router("sparsemixer", embed_dim=1, num_experts=4, gate="full")
    routing = router.route(z)
    (gradient,) = torch.autograd.grad(routing.gate.sum(), z)
    p, q = z[0].detach().softmax(-1), masked_softmax(z[0].detach(), 0.1)
    assert q[3] == 0
    seen = set()
    for d, gate, row in zip(routing.expert_index[:, 0], routing.gate[:, 0], gradient):
        own = p[d] * (torch.eye(4)[d] - p)
        choice = p[d] * (torch.eye(4)[d] - q)
        half = gate < 0.75 * p[d]
        torch.testing.assert_close(gate, p[d] * (0.5 if half else 1.0))
        wanted = own + choice if d == 0 else (2 * choice if half else 2 * own)
        torch.testing.assert_close(row, wanted)
        seen.add((d.item(), half.item()))
    assert seen == {(0, False), (1, False), (1, True), (2, False), (2, True)}


@pytest.mark.parametrize("name", SPARSEMIXERS)
def test_where_nothing_is_masked_both_gates_are_the_same(name):
    top_k = 2 if ROUTERS[name].max_top_k is None else 1
    z = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.linspace(-1, 1, 50).unsqueeze(-1)
    found = []
    for gate in ("masked", "full"):
        torch.manual_seed(1)
        router = build_router(
            name, embed_dim=2, num_experts=4, top_k=top_k, jitter_eps=NO_MASK, gate=gate
        )
        torch.manual_seed(2)
        routing = router.route(z)
        loss = (routing.gate * weight).sum()
        if routing.mean_gate is not None:
            loss = loss + (routing.mean_gate * weight).sum()
        found.append((routing.expert_index, routing.gate, torch.autograd.grad(loss, z)[0]))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1:], found[1][1:])


def test_one_expert_within_the_mask_leaves_the_full_gate_a_gradient():
    z = torch.tensor([[2.0, 1.0, 0.5]]).repeat(8, 1).requires_grad_()
    for gate, learns in (("masked", False), ("full", True)):
        router = build_router("sparsemixer", embed_dim=1, num_experts=3, gate=gate)
        routing = router.route(z)
        (gradient,) = torch.autograd.grad(routing.gate.sum(), z)
        assert (gradient.abs().sum(-1) > 0.1).tolist() == [learns] * 8
        expected = z.softmax(-1)[:, :1] if learns else torch.ones(8, 1)
        torch.testing.assert_close(routing.gate, expected)
        assert torch.equal(routing.sampling_probs[0], torch.tensor([1.0, 0.0, 0.0]))


def test_a_mask_of_nothing_but_the_argmax_needs_a_gate_of_its_own():
    build_router("sparsemixer", embed_dim=1, num_experts=3, gate="full", jitter_eps=0.0)
    for name, gate in (("sparsemixer", "masked"), ("sparsemixer-v2", "full")):
        with pytest.raises(ValueError, match=r"jitter_eps must be at least 1e-06.*a gradient"):
            build_router(name, embed_dim=1, num_experts=3, gate=gate, jitter_eps=0.0)


@pytest.mark.parametrize("name", SPARSEMIXERS)
def test_evaluation_takes_the_argmax_with_its_own_gate(name):
    z = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    router = build_router(name, embed_dim=2, num_experts=4, gate="full").eval()
    routing = router.route(z)
    assert torch.equal(routing.expert_index[:, 0], z.argmax(-1))
    p = (z / router.temperature).softmax(-1).amax(-1, keepdim=True)
    torch.testing.assert_close(routing.gate, p)


@pytest.mark.parametrize("name", SPARSEMIXERS)
def test_the_gate_is_no_part_of_the_state(name):
    layers = [MoEFeedForward(4, 6, 3, router=name, **gate) for gate in ({}, {"gate": "full"})]
    layers[1].load_state_dict(layers[0].state_dict())


@pytest.mark.parametrize("seed", range(3))
def test_a_control_variate_of_the_full_gate_adds_nothing_to_the_mean(seed, in_double, monkeypatch):
    """For linear f, whose slope does not depend on the draw."""
    z, outputs = logits_and_outputs(seed, 0.1)
    f, means = polynomial(1, seed), outputs.flip(0) + 0.5
    options = {"gate": "full", "jitter_eps": 0.1, **NO_OVERRIDE}
    z_grad = z.clone().requires_grad_()
    q = masked_softmax(z, 0.1)
    routing, probability = enumerate_draws("sparsemixer-cv", z_grad, monkeypatch, q, 0.5, **options)
    slope = torch.autograd.functional.jacobian(f, torch.zeros(1, 3, dtype=torch.double))[0, 0]
    added = torch.autograd.grad((probability * (routing.mean_gate @ means @ slope)).sum(), z_grad)
    torch.testing.assert_close(added[0], torch.zeros_like(z), rtol=0, atol=1e-12)
    # Exact means leave no variance: each draw is the mean of both evaluation points.
    routing, _ = enumerate_draws("sparsemixer-cv", z_grad, monkeypatch, q, 0.5, **options)
    h = routing.gate * outputs[routing.expert_index[:, 0]] + routing.mean_gate @ outputs
    rows = torch.stack([torch.autograd.grad(v, z_grad, retain_graph=True)[0] for v in f(h)])
    exact = exact_gradient(z, outputs, f, 0.1, "full")
    torch.testing.assert_close((rows[::2] + rows[1::2]) / 2, exact.expand(len(rows) // 2, -1))


# Choice, gate, estimator; highest degree of f for which the mean is exact, terms (grad_1, grad_0).
DRAWN = [
    ("masked-sample", "masked", "grad-1", 4, (True, False)),
    ("masked-sample", "full", "grad-1", 4, (True, False)),
    ("full-sample", "full", "grad-1", 4, (True, False)),
    *(
        (choice, gate, estimator, degree, (True, True))
        for estimator, degree in (("first-order", 1), ("midpoint", 2))
        for choice, gate in (
            ("masked-sample", "masked"),
            ("masked-sample", "full"),
            ("masked-sample", "one"),
            ("full-sample", "full"),
            ("full-sample", "one"),
        )
    ),
]
TAKEN = [
    *((c, g, "grad-1") for c in ("argmax", "jittered-argmax") for g in ("full", "masked")),
    *((c, "one", "first-order") for c in ("argmax", "jittered-argmax")),
]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("choice", "gate", "estimator", "highest", "terms"), DRAWN)
def test_a_composed_router_that_draws_is_exact_up_to_a_degree_and_not_beyond(
    choice, gate, estimator, highest, terms, seed, in_double, monkeypatch
):
    z, outputs = logits_and_outputs(seed, 0.1)
    factors = {"choice": choice, "gate": gate, "estimator": estimator}
    mask = 0.1 if choice == "masked-sample" else NO_MASK
    chance = 0.5 if estimator == "midpoint" else 1.0
    for degree in range(1, min(highest + 1, 4) + 1):
        f = polynomial(degree, seed)
        exact = exact_gradient(z, outputs, f, mask, gate, terms=terms)
        mean = mean_gradient(
            *("composed", z, outputs, f, monkeypatch, chance),
            **{**factors, **NO_OVERRIDE, "jitter_eps": 0.1},
        )
        if degree <= highest:
            torch.testing.assert_close(mean, exact, rtol=1e-8, atol=1e-9)
        else:
            assert relative_error(mean, exact) > 1e-4


@pytest.mark.parametrize(("choice", "gate", "estimator"), TAKEN)
@pytest.mark.parametrize("training", [True, False])
def test_a_composed_router_that_takes_the_largest(choice, gate, estimator, training, monkeypatch):
    torch.manual_seed(0)
    z, jitter = torch.randn(30, 4).requires_grad_(), torch.empty(30, 4).uniform_(0.9, 1.1)
    router = build_router(
        "composed", embed_dim=1, num_experts=4, choice=choice, gate=gate, estimator=estimator
    ).train(training)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "uniform_", lambda like, a, b: jitter)
        routing = router.route(z)
    for t in range(30):
        row = z[t].detach().clone().requires_grad_()
        scores = row * jitter[t] if training and choice == "jittered-argmax" else row
        d = int(scores.argmax())
        kept = masked_softmax(scores.detach(), 0.1) > 0
        value = {
            "one": torch.ones(()),
            "full": scores.softmax(-1)[d],
            "masked": scores.masked_fill(~kept, float("-inf")).softmax(-1)[d],
        }[gate]
        assert routing.expert_index[t, 0] == d
        torch.testing.assert_close(routing.gate[t, 0], value)
        if training:
            (found,) = torch.autograd.grad(routing.gate[t, 0], z, retain_graph=True)
            surrogate = scores.log_softmax(-1)[d] if gate == "one" else value
            torch.testing.assert_close(found[t], torch.autograd.grad(surrogate, row)[0])


def bits(name, seed, z, **options):
    torch.manual_seed(seed)
    layer = MoEFeedForward(4, 6, z.shape[1], router=name, **options)
    z = z.clone().requires_grad_()
    routing = layer.router.route(z)
    (gradient,) = torch.autograd.grad((routing.gate.square() + routing.probs).sum(), z)
    return [routing.expert_index, routing.gate, routing.sampling_probs, gradient, torch.rand(2)]


@pytest.mark.parametrize(
    ("name", "factors"),
    [
        ("switch-omega", ("jittered-argmax", "full", "grad-1")),
        ("sparsemixer-1st", ("masked-sample", "masked", "first-order")),
        ("sparsemixer", ("masked-sample", "masked", "midpoint")),
    ],
)
def test_named_routers_are_points_of_the_grid_to_the_last_bit(name, factors):
    z = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    options = dict(zip(("choice", "gate", "estimator"), factors))
    for value, wanted in zip(bits("composed", 1, z, **options), bits(name, 1, z)):
        assert torch.equal(value, wanted)
    assert build_router("composed", embed_dim=3, num_experts=2, omega=False).output_scale is None


@pytest.mark.parametrize("name", SPARSEMIXERS)
def test_the_masked_gate_is_the_papers_to_the_last_bit(name, monkeypatch):
    """As it was before there was another: m p~_D forwards, a multiple of its gradient backwards."""
    z = torch.randn(300, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    coins = torch.rand(300, 1, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(torch, "rand_like", lambda _: coins)
    router = build_router(name, embed_dim=2, num_experts=5)
    routing = router.route(z)
    estimator, index = ESTIMATORS[name], routing.expert_index
    best = z.detach().max(-1, keepdim=True)
    hidden = sparsemixer.unreachable(z.detach(), best.values, 0.1)
    masked = z.masked_fill(hidden, float("-inf"))
    p = (masked / estimator.temperature if estimator.temperature != 1 else masked).softmax(-1)
    p = p.gather(-1, index)
    full = (coins < estimator.chance) | (best.indices == index)
    m = torch.where(full, 1.0, torch.tensor(estimator.point))
    gate = m * p.detach() + estimator.factor * (p - p.detach())
    assert torch.equal(routing.gate, gate)
    weight = torch.randn(300, 1)
    found, wanted = (torch.autograd.grad((g * weight).sum(), z)[0] for g in (routing.gate, gate))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"choice": "sample"}, "choice must be argmax or jittered-argmax or .*, not 'sample'"),
        ({"gate": "p"}, "gate must be masked or full or one, not 'p'"),
        ({"estimator": "euler"}, "estimator must be grad-1 or first-order or midpoint, not"),
        ({"choice": "full-sample"}, "gate 'masked' is 0 for experts outside the mask"),
        ({"gate": "one", "estimator": "grad-1"}, "'grad-1' leaves the router without a gradient"),
        ({"choice": "argmax"}, "choice 'argmax' draws none: use estimator grad-1"),
        ({"choice": "argmax", "gate": "one"}, "draws none: use estimator grad-1, or first-order"),
        (
            {"choice": "jittered-argmax", "gate": "full", "estimator": "first-order"},
            "choice 'jittered-argmax' draws none",
        ),
        (
            {"choice": "jittered-argmax", "gate": "full", "estimator": "grad-1", "jitter_eps": 1.0},
            "jitter_eps must be at least 0 and below 1 for router 'composed', not 1.0",
        ),
        ({"jitter_eps": 0.0}, "jitter_eps must be at least 1e-06"),
    ],
)
def test_what_means_nothing_is_refused_with_its_reason(options, message):
    with pytest.raises(ValueError, match=message):
        build_router("composed", embed_dim=2, num_experts=4, **options)


@pytest.mark.parametrize("name", ["sparsemixer", "hash"])
def test_a_gate_must_be_known(name):
    with pytest.raises(ValueError, match=r"gate must be (masked|one) or full, not 'p'"):
        build_router(name, embed_dim=2, num_experts=4, gate="p")


def test_hash_does_not_depend_on_the_type_of_the_ids():
    router = build_router("hash", embed_dim=6, num_experts=4)
    ids = torch.tensor([0, 5, 6, 7, 1000, 31999])
    for kind in (torch.int32, torch.int16):
        assert torch.equal(router.expert_of(ids.to(kind)), router.expert_of(ids))


def test_hash_may_learn_its_gate():
    torch.manual_seed(0)
    tokens = torch.arange(40)
    x = torch.randn(40, 6)
    plain = build_router("hash", embed_dim=6, num_experts=4)
    router = build_router("hash", embed_dim=6, num_experts=4, gate="full")
    assert plain.weight is None
    routing = router(x, token_ids=tokens)
    assert torch.equal(routing.expert_index, plain(x, token_ids=tokens).expert_index)
    p = (x @ router.weight.t() + router.bias).softmax(-1)
    for t, d in enumerate(routing.expert_index[:, 0]):
        torch.testing.assert_close(routing.gate[t, 0], p[t, d])
    found = torch.autograd.grad(routing.gate.square().sum(), router.weight)[0]
    wanted = p.gather(-1, routing.expert_index).square().sum()
    torch.testing.assert_close(found, torch.autograd.grad(wanted, router.weight)[0])
