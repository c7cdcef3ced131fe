"""What the estimators expect, by enumerating all draws; the code released with GRIN."""

import numpy as np
import pytest
import torch
from support.enumeration import enumerate_draws, polynomial, problem, relative_error, smooth
from support.reference_routers import (
    ESTIMATORS,
)
from support.transformers_models import modeling

from fairseq_sparsemixer.moe import build_router


def draws_of(name, z, monkeypatch, nodes=((0.5, 1.0),), **options):
    """:func:`enumerate_draws` of a router as its paper has it, without a mask."""
    estimator = ESTIMATORS.get(name)
    p = (z.detach() / (estimator.temperature if estimator else 1.0)).softmax(-1)
    chance = estimator.chance if estimator else 1.0
    return enumerate_draws(name, z, monkeypatch, p, chance, nodes, **options)


def expected_gradient(name, z, outputs, f, monkeypatch, means=None, nodes=((0.5, 1.0),), **options):
    """The estimator's mean gradient to the logits."""
    z = z.clone().requires_grad_()
    routing, probability = draws_of(name, z, monkeypatch, nodes, **options)
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


NO_OVERRIDE = {"first_order_on_argmax": False}


# router, options, the highest degree of f for which its mean is the exact gradient
DEGREES = [
    ("sparsemixer-1st", {}, 1),
    ("sparsemixer", NO_OVERRIDE, 2),
    ("sparsemixer-v2-star", NO_OVERRIDE, 3),
    ("straight-through", {}, 1),
    ("reinmax", {}, 2),
]


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
        routing, _ = draws_of(name, z_grad, monkeypatch)
        h = (routing.gate.unsqueeze(-1) * outputs[routing.expert_index]).sum(1)
        if routing.mean_gate is not None:
            h = h + routing.mean_gate @ outputs
        rows = [torch.autograd.grad(v, z_grad, retain_graph=True)[0] for v in f(h)]
        spread[name] = max(relative_error(row, exact) for row in rows)
    assert spread["sparsemixer-cv"] < 1e-9
    assert spread["sparsemixer"] > 0.1


@pytest.fixture(scope="module")
def phimoe():
    return modeling("phimoe")


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
