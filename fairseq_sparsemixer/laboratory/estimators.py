"""The routers as estimators of the router's gradient, and one that is not a router."""

import dataclasses
from typing import Any, Dict, Optional

import torch
from torch import Tensor

from fairseq_sparsemixer.laboratory.problems import Evaluation, Problem
from fairseq_sparsemixer.moe import Router, Routing, build_router

NO_MASK = 1e9
"""A jitter_eps that masks no expert."""


@dataclasses.dataclass(frozen=True)
class Estimator:
    """One way to estimate the gradient to the logits.

    Attributes:
        router: registered name, or "reinforce" (see :func:`draw_gradients`).
        options: of the router.
        prediction: which of the problem's predictions its ``mean_gate`` multiplies.
        draws: how many draws of each token are taken.
        continuous: whether each draw has an evaluation point of its own. f is evaluated once for
            each distinct point, so this is for problems whose f costs nothing.
        uses_mask: whether jitter_eps decides which experts it draws from.
    """

    router: str
    options: Dict[str, Any] = dataclasses.field(default_factory=dict)
    prediction: str = "mean"
    draws: int = 1000
    continuous: bool = False
    uses_mask: bool = False


def _sparsemixer(router: str, **options: Any) -> Estimator:
    return Estimator(router, options, uses_mask=True)


ESTIMATORS: Dict[str, Estimator] = {
    # What ordinary training has: grad_1 at the arg-max, and the same under sampling.
    "switch (arg-max)": Estimator("switch", draws=1),
    "backprop, sampled": _sparsemixer("composed", estimator="grad-1"),
    "sparsemixer-1st": _sparsemixer("sparsemixer-1st"),
    "sparsemixer, no override": _sparsemixer("sparsemixer", first_order_on_argmax=False),
    "sparsemixer": _sparsemixer("sparsemixer"),
    # Drawn as these, with the gate of all experts: the same where nothing is masked.
    "sparsemixer-1st, full gate": _sparsemixer("sparsemixer-1st", gate="full"),
    "sparsemixer, full gate, no override": _sparsemixer(
        "sparsemixer", first_order_on_argmax=False, gate="full"
    ),
    "sparsemixer, full gate": _sparsemixer("sparsemixer", gate="full"),
    "sparsemixer, uniform": dataclasses.replace(
        _sparsemixer("sparsemixer", first_order_on_argmax=False, quadrature="uniform"),
        continuous=True,
    ),
    "sparsemixer-v2": _sparsemixer("sparsemixer-v2"),
    "sparsemixer-v2-star, no override": _sparsemixer(
        "sparsemixer-v2-star", first_order_on_argmax=False
    ),
    "sparsemixer-v2-star": _sparsemixer("sparsemixer-v2-star"),
    "sparsemixer-cv": _sparsemixer("sparsemixer-cv"),
    "sparsemixer-cv, no override": _sparsemixer("sparsemixer-cv", first_order_on_argmax=False),
    "default-moe": Estimator("default-moe", draws=1),
    "straight-through (dense)": Estimator("straight-through"),
    "reinmax (dense)": Estimator("reinmax"),
    "reinforce": Estimator("reinforce", uses_mask=True),
}
"""By the name in tables and figures."""


def with_other_predictions(problem: Problem) -> Dict[str, Estimator]:
    """:data:`ESTIMATORS`, and ``sparsemixer-cv`` with each further prediction of the problem."""
    estimators = dict(ESTIMATORS)
    for prediction in problem.predictions:
        if prediction != "mean":
            estimators[f"sparsemixer-cv, {prediction}"] = dataclasses.replace(
                ESTIMATORS["sparsemixer-cv"], prediction=prediction
            )
    return estimators


def _build(estimator: Estimator, num_experts: int, jitter_eps: float) -> Router:
    if not estimator.uses_mask:
        jitter_eps = 0.0
    if estimator.router == "reinforce":
        estimator = ESTIMATORS["backprop, sampled"]
    return build_router(
        estimator.router,
        embed_dim=1,
        num_experts=num_experts,
        jitter_eps=jitter_eps,
        **estimator.options,
    )


def target_probs(problem: Problem, estimator: Estimator, jitter_eps: float) -> Tensor:
    """(R, N): the distribution of the experts in what the estimator is measured against.

    The masked softmax for estimators that have the mask, else softmax(z).
    """
    eps = jitter_eps if estimator.uses_mask else NO_MASK
    router = _build(ESTIMATORS["backprop, sampled"], problem.num_experts, eps)
    return router.route(problem.logits).sampling_probs


def target_gradient(problem: Problem, estimator: Estimator, jitter_eps: float) -> Tensor:
    """(R, N): the exact gradient that the estimator is measured against, that of its own gate."""
    full = estimator.options.get("gate") == "full"
    gates = problem.logits.softmax(-1) if full else None
    return problem.exact_gradient(target_probs(problem, estimator, jitter_eps), gates)


def draw_gradients(
    problem: Problem,
    estimator: Estimator,
    jitter_eps: float,
    draws: Optional[int] = None,
) -> Tensor:
    """(R, S, N): S independent draws of the estimated gradient to the logits of each token.

    The router itself is run in training mode; only f is evaluated by the problem, once for each
    distinct h. ``reinforce`` is (f(h) - f(0)) dlog p_D + grad_1: no bias, at the price of noise.

    Args:
        problem: the tokens.
        estimator: what to draw from.
        jitter_eps: of the mask, where the estimator has one.
        draws: S, if not the estimator's own.
    """
    router = _build(estimator, problem.num_experts, jitter_eps)
    # v2* samples from softmax(z / 2): given 2 z it has the distribution of the others.
    scale = router.temperature
    rows, num_experts = problem.logits.shape
    draws = estimator.draws if draws is None else draws
    row_M = torch.arange(rows).repeat_interleave(draws)
    z_MN = (scale * problem.logits)[row_M].requires_grad_()
    routing = router.route(z_MN)
    weight_MN = torch.zeros(len(row_M), num_experts)
    weight_MN = weight_MN.scatter_add(-1, routing.expert_index, routing.gate)
    mean_weight_MN = torch.zeros_like(weight_MN) if routing.mean_gate is None else routing.mean_gate
    at_h = _evaluate_distinct(problem, row_M, weight_MN, mean_weight_MN, estimator.prediction)
    # The chain rule: f'(h) . dh, with the slopes held fixed.
    surrogate = (weight_MN * at_h.expert_slope + mean_weight_MN * at_h.mean_slope).sum()
    if estimator.router == "reinforce":
        surrogate = surrogate + _score_term(problem, row_M, routing, at_h.loss)
    (gradient_MN,) = torch.autograd.grad(surrogate, z_MN)
    return scale * gradient_MN.reshape(rows, draws, num_experts)


@torch.no_grad()
def _evaluate_distinct(
    problem: Problem, row_M: Tensor, weight_MN: Tensor, mean_weight_MN: Tensor, prediction: str
) -> Evaluation:
    """:meth:`Problem.evaluate`, once for each h that occurs."""
    key = torch.cat([weight_MN, mean_weight_MN], dim=-1)
    key = torch.cat([row_M.unsqueeze(-1).double(), (key.double() * 1e6).round()], dim=-1)
    distinct, place_M = key.unique(dim=0, return_inverse=True)
    # Any of the equal rows stands for them.
    first = torch.zeros(len(distinct), dtype=torch.long)
    first.scatter_(0, place_M, torch.arange(len(row_M)))
    at_h = problem.evaluate(row_M[first], weight_MN[first], mean_weight_MN[first], prediction)
    return Evaluation(*(value[place_M] for value in at_h))


def _score_term(problem: Problem, row_M: Tensor, routing: Routing, loss_M: Tensor) -> Tensor:
    """sum of (f(h) - f(0)) log p_D."""
    nothing_RN = torch.zeros_like(problem.logits)
    at_zero = problem.evaluate(torch.arange(len(nothing_RN)), nothing_RN, nothing_RN)
    log_prob_M = routing.sampling_probs.gather(-1, routing.expert_index).squeeze(-1).log()
    return ((loss_M - at_zero.loss[row_M]) * log_prob_M).sum()
