"""SparseMixer: a sparse estimate of the whole router gradient (arXiv 2310.00811, 2409.12136).

D ~ q is drawn, and h = g_D E_D(x) is put out. The papers draw from q = p~, the softmax over the
experts within the mask, and the gate is g = p~, too. In general the gradient of
E[f(h)] = sum_i q_i f(h_i), h_i = g_i E_i, has two terms:

    grad_1 = E[ f'(h) E_D dg_D ]                                      what backpropagation gives
    grad_0 = sum_i [f(h_i) - f(0)] dq_i = E[ (f(h) - f(0)) dlog q_D ]         the choice itself

with f(0) a free baseline because sum_i dq_i = 0. A quadrature f(h) - f(0) ~ (w f'(h) +
(1 - w) f'(m' h)) h gives grad_0 from the one expert that was computed. All routers here draw one
point m, 1 with chance c and else m', and scale the gate by m in the forward pass alone, so that f'
is taken at m h. The gradient at the gate reaches the router as

    m = 1:    1/c dg_D + w/c g_D dlog q_D
    m = m':   (1 - w)/(1 - c) g_D dlog q_D

whose mean over D and m is grad_1 + grad_0 to the order of the quadrature. Where g = q,
g_D dlog q_D is dg_D, and c = (1 + w)/2 makes the factor 2 at both points (5/8 for w = 1/4). The
*full* gate g = p, the softmax over all experts, is another function than q = p~: p_D moves with
every logit, p~_D with those within the mask alone, and it is the constant 1 where one is left.
"""

import math
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor, nn

from fairseq_sparsemixer.moe.adaptation import ExpertLines, ExpertMeans
from fairseq_sparsemixer.moe.kernels import router as fused_router
from fairseq_sparsemixer.moe.routing import (
    Context,
    EvaluationRule,
    Router,
    Routing,
    one_hot,
    register_router,
)

LEAST_JITTER = 1e-6
"""Less hardly tells two float32 logits apart."""
UNDECIDED_MASKED = 10.0
"""Logits that start from it are masked where they are 2 eps as much below the largest, at eps = 0.1
by 2. Near 0 the first updates would mask all but one, and its gate jump from 1/N to 1."""


def unreachable(logits_TN: Tensor, max_T1: Tensor, jitter_eps: float) -> Tensor:
    """(T, N) bool: the experts that jitter could not have made the largest.

    Expert i is masked where (max_j z_j - z_i) / max(|z_i|, max_j z_j) > 2 eps (the
    mask of arXiv 2310.00811). Written without the division, which is 0/0 for logits of zero; the
    arg-max is never masked.

    Args:
        logits_TN: z, detached.
        max_T1: the largest of each row.
        jitter_eps: eps.
    """
    scale_TN = torch.maximum(logits_TN.abs(), max_T1)
    return logits_TN < torch.sub(max_T1, scale_TN, alpha=min(2 * jitter_eps, 1e30))


def sample(logits_TN: Tensor) -> Tensor:
    """(T, 1) int64: one draw for each row from softmax(logits), by Gumbel-max.

    A logit of -inf is never drawn: the noise is kept finite.
    """
    with torch.no_grad():
        exponential_TN = torch.empty_like(logits_TN).exponential_()
        tiny = torch.finfo(logits_TN.dtype).tiny
        return (logits_TN - exponential_TN.clamp_min(tiny).log()).argmax(dim=-1, keepdim=True)


def scale_gradient(value: Tensor, forward: Any, backward: Any) -> Tensor:
    """``forward * value`` exactly, with ``backward`` times the gradient going to ``value``."""
    detached = value.detach()
    return forward * detached + backward * (value - detached)


class QuadratureRule(NamedTuple):
    """Which terms are estimated, and from f' at which points: see the head of this file."""

    chance: float = 1.0
    """c, that of m = 1."""
    weight: float = 1.0
    """w, of f'(h) in the estimate of f(h) - f(0)."""
    point: Optional[float] = 1.0
    """m'; None draws it from U(0, 1)."""
    terms: Tuple[float, float] = (1.0, 1.0)
    """1 for what is estimated of grad_1 and grad_0, else 0."""


# Functions, because Dynamo of torch 2.6 knows no properties of tuples.
def _slopes_at_full(rule: QuadratureRule) -> Tuple[float, float]:
    """Factors of dg_D and g_D dlog q_D where m = 1."""
    return rule.terms[0] / rule.chance, rule.terms[1] * rule.weight / rule.chance


def _slopes_at_other(rule: QuadratureRule) -> Tuple[float, float]:
    """Factors of dg_D and g_D dlog q_D where m = m'; 0 where m is always 1."""
    if rule.chance == 1:
        return 0.0, 0.0
    return 0.0, rule.terms[1] * (1 - rule.weight) / (1 - rule.chance)


GRAD_1 = QuadratureRule(terms=(1.0, 0.0))
"""Plain backpropagation."""
FIRST_ORDER = QuadratureRule()
"""f'(h) h."""
MIDPOINT = QuadratureRule(0.5, 0.0, 0.5)
"""f'(h/2) h."""
UNIFORM = QuadratureRule(0.5, 0.0, None)
"""f'(m h) h with m ~ U(0, 1)."""
HEUN = QuadratureRule(0.625, 0.25, 1 / 3)
"""(1/4 f'(h) + 3/4 f'(h/3)) h."""
HEUN_OF_CHOICE = QuadratureRule(0.25, 0.25, 1 / 3, terms=(0.0, 1.0))
"""The same without grad_1."""


class SparseMixerBase(Router):
    """What all share: the mask, draws without replacement, the gate and its gradient.

    Evaluation: the largest logits, m = 1; mask and gate stay.

    Args:
        gate: ``"masked"``: p~_D, the softmax over the experts within the mask. ``"full"``: p_D,
            the softmax over all experts (with K draws over all that are left), while D is still
            drawn from p~; of this project. They are the same where nothing is masked.
        **options: see :class:`~fairseq_sparsemixer.moe.Router`.
    """

    gates: Tuple[str, ...] = ("masked", "full")
    """What the gate may be."""
    rule = FIRST_ORDER
    first_order_on_argmax = False
    """Whether m = 1, with both terms in full, wherever D is the arg-max of what is left."""
    sampled = True
    """Whether training draws D from q; else D has the largest logit."""
    masked = True
    """Whether q is p~; else it is p."""

    def __init__(self, *, gate: str = "masked", **options: Any) -> None:
        super().__init__(**options)
        if gate not in self.gates:
            raise ValueError(f"gate must be {' or '.join(self.gates)}, not {gate!r}")
        self.gate = gate
        # Of one expert within the mask there is the full gate's own gradient.
        learns = gate == "full" and self.rule.terms[0] > 0
        if self.masked and not learns and self.jitter_eps < LEAST_JITTER and self.num_experts > 1:
            raise ValueError(
                f"jitter_eps must be at least {LEAST_JITTER} for router {self.name!r}, not "
                f"{self.jitter_eps}: the mask would leave one expert, with probability 1, and the "
                "router without a gradient"
            )

    @property
    def gate_is_chance(self) -> bool:
        """Whether g = q, so that dg_D and g_D dlog q_D are the same."""
        return self.gate == ("masked" if self.masked else "full")

    @property
    def undecided_logit(self) -> float:
        """See :meth:`Router.undecided_logit`: all experts are within the mask of a masked gate."""
        return UNDECIDED_MASKED if self.masked and self.gate == "masked" else 0.0

    def evaluation_rule(self) -> EvaluationRule:
        """See :meth:`Router.evaluation_rule`."""
        if self.gate == "masked":
            return EvaluationRule("masked", self.jitter_eps, self.temperature)
        return EvaluationRule({"full": "left", "one": "one"}[self.gate], None, self.temperature)

    def select(self, logits_TN: Tensor, context: Context) -> Routing:
        """See :meth:`Router.select`."""
        logits_TN = self.biased(logits_TN)
        fused = fused_router.serves(logits_TN, self.backend)
        estimator = self.fused_estimator() if fused else None
        if estimator is not None:
            index_T1, gate_T1, probs_TN, masked_TN = fused_router.choose(estimator, logits_TN)
            return Routing(index_T1, gate_T1, logits_TN, probs_TN, masked_TN)
        index_T1, gate_T1, probs_TN = self._draw(logits_TN)
        indices, gates, left_TN = [index_T1], [gate_T1], logits_TN
        while len(indices) < self.top_k:
            left_TN = left_TN.scatter(-1, indices[-1], float("-inf"))
            index_T1, gate_T1, _ = self._draw(left_TN)
            indices.append(index_T1)
            gates.append(gate_T1)
        return Routing(
            expert_index=torch.cat(indices, dim=-1) if len(indices) > 1 else index_T1,
            gate=torch.cat(gates, dim=-1) if len(gates) > 1 else gate_T1,
            logits=logits_TN,
            probs=logits_TN.softmax(dim=-1) if self.masked else probs_TN,
            sampling_probs=probs_TN,
        )

    def _draw(self, left_TN: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """One of the experts that are left: its (T, 1) index and gate, and the (T, N) q."""
        detached_TN = left_TN.detach()
        max_T1, best_T1 = detached_TN.max(dim=-1, keepdim=True)
        kept_TN = left_TN
        if self.masked:
            masked_out_TN = unreachable(detached_TN, max_T1, self.jitter_eps)
            kept_TN = left_TN.masked_fill(masked_out_TN, -math.inf)
        if self.temperature != 1:
            left_TN, kept_TN = left_TN / self.temperature, kept_TN / self.temperature
        probs_TN = kept_TN.softmax(dim=-1)
        index_T1 = sample(kept_TN) if self.training and self.sampled else best_T1
        if self.gate_is_chance:
            gate_T1 = probs_TN.gather(-1, index_T1)
        elif self.gate == "full":
            gate_T1 = left_TN.softmax(dim=-1).gather(-1, index_T1)
        else:
            gate_T1 = torch.ones_like(max_T1)
        if not self.training:
            return index_T1, gate_T1, probs_TN
        is_best = index_T1 == best_T1
        full_T1, point_T1 = self._evaluation_point(gate_T1, is_best)
        if self.gate_is_chance:
            gate_T1 = scale_gradient(
                gate_T1, forward=point_T1, backward=sum(_slopes_at_full(self.rule))
            )
        else:
            log_prob_T1 = kept_TN.log_softmax(dim=-1).gather(-1, index_T1)
            own_T1, choice_T1 = self._factors(gate_T1, full_T1, is_best)
            value_T1 = gate_T1.detach()
            gate_T1 = scale_gradient(gate_T1, forward=point_T1, backward=own_T1)
            # 0 in the forward pass, exactly.
            gate_T1 = gate_T1 + choice_T1 * value_T1 * (log_prob_T1 - log_prob_T1.detach())
        return index_T1, gate_T1, probs_TN

    def _evaluation_point(self, gate_T1: Tensor, is_best: Tensor) -> Tuple[Tensor, Tensor]:
        """(T, 1) each: whether m is 1, and m."""
        chance, point = self.rule.chance, self.rule.point
        if chance == 1:
            return torch.ones_like(is_best), torch.ones_like(gate_T1)
        full_T1 = torch.rand_like(gate_T1) < chance
        if self.first_order_on_argmax:
            full_T1 = full_T1 | is_best
        other_T1 = torch.rand_like(gate_T1) if point is None else gate_T1.new_full((), point)
        return full_T1, torch.where(full_T1, 1.0, other_T1)

    def _factors(self, gate_T1: Tensor, full_T1: Tensor, is_best: Tensor) -> Tuple[Tensor, Tensor]:
        """(T, 1) each: the factors of dg_D and of g_D dlog q_D in the gradient of the gate."""
        rule, factors = self.rule, []
        for full, other, term in zip(_slopes_at_full(rule), _slopes_at_other(rule), rule.terms):
            factor_T1 = torch.where(full_T1, gate_T1.new_full((), full), other)
            if self.first_order_on_argmax:
                factor_T1 = torch.where(is_best, gate_T1.new_full((), term), factor_T1)
            factors.append(factor_T1)
        return factors[0], factors[1]

    def fused_estimator(self) -> Optional[fused_router.FusedEstimator]:
        """What :meth:`select` computes, for kernels that do the same; None where there are none."""
        rule = self.rule if self.training else GRAD_1
        if self.top_k > 1 or rule.point is None:
            return None
        full = _slopes_at_full(rule)
        return fused_router.FusedEstimator(
            self.jitter_eps if self.masked else None,
            self.temperature,
            self.sampled and self.training,
            (rule.chance, rule.point),
            self.first_order_on_argmax,
            sum(full),
            "chance" if self.gate_is_chance else self.gate,
            () if self.gate_is_chance else (*full, *_slopes_at_other(rule), *rule.terms),
        )


class _WithOverride(SparseMixerBase):
    """Routers whose m is 1 at the arg-max unless asked otherwise."""

    def __init__(self, *, first_order_on_argmax: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.first_order_on_argmax = first_order_on_argmax


@register_router("sparsemixer-1st")
class SparseMixerFirstOrderRouter(SparseMixerBase):
    """SparseMixer-1st, the Euler method (arXiv 2310.00811).

    f(h) - f(0) ~ f'(h) h, hence grad_0 ~ grad_1: forward gate p~_D, twice the gradient to p~_D.
    Everything else as in :class:`SparseMixerRouter`, omega included, so that the two differ in
    the order of the estimate only. With the full gate: p_D, of gradient dp_D + p_D dlog p~_D.

    Args:
        jitter_eps: eps of the mask, above 0; a very large value masks nothing.
        omega: whether the output is multiplied by a learned omega.
        **options: see :class:`SparseMixerBase` (``gate``).
    """

    def __init__(self, *, omega: bool = True, **options: Any) -> None:
        super().__init__(**options)
        if omega:
            self.output_scale = nn.Parameter(torch.ones(self.embed_dim))


@register_router("sparsemixer")
class SparseMixerRouter(_WithOverride):
    """SparseMixer, the mid-point method (Liu et al. 2023, arXiv 2310.00811).

    f(h) - f(0) ~ f'(h/2) h. Sampled: m is 1 or 1/2 with probability 1/2 each, the forward gate is
    m p~_D, and the gradient that reaches p~_D is twice the gradient at the gate. In expectation
    this is the exact gradient for every quadratic f where ``first_order_on_argmax`` is off.

    With the full gate: m p_D, of gradient 2 dp_D where m = 1 and 2 p_D dlog p~_D where m = 1/2;
    under ``first_order_on_argmax`` dp_D + p_D dlog p~_D at the arg-max.

    The expert output is also multiplied by a learned omega in R^D, initially 1, shared by all
    experts (``output_scale``).

    Args:
        jitter_eps: eps of the mask, above 0; a very large value masks nothing.
        first_order_on_argmax: m = 1 wherever D is the arg-max, so that experts are trained on
            full outputs (the paper's choice; off for ablation).
        omega: whether the output is multiplied by a learned omega.
        quadrature: ``"midpoint"``, or ``"uniform"`` to draw the second point from U(0, 1) in place
            of 1/2: f(h) - f(0) is the integral of f'(m h) h over m, so this is exact for every
            differentiable f, with more variance (of this project, not of the paper).
        **options: see :class:`SparseMixerBase` (``gate``).
    """

    def __init__(self, *, omega: bool = True, quadrature: str = "midpoint", **options: Any) -> None:
        super().__init__(**options)
        if quadrature not in ("midpoint", "uniform"):
            raise ValueError(f"quadrature must be midpoint or uniform, not {quadrature!r}")
        self.quadrature = quadrature
        self.rule = MIDPOINT if quadrature == "midpoint" else UNIFORM
        if omega:
            self.output_scale = nn.Parameter(torch.ones(self.embed_dim))


PREDICTIONS: Dict[str, Callable[..., Union[ExpertMeans, ExpertLines]]] = {
    "mean": ExpertMeans,
    "linear": ExpertLines,
}
"""What a control variate may know of the experts that were not computed."""


@register_router("sparsemixer-cv")
class SparseMixerControlVariateRouter(SparseMixerRouter):
    """SparseMixer with a control variate: of this project, see docs/routers.md.

    SparseMixer's gradient for a token is one sample c_D dp~_D of sum_i p~_i c_i dp~_i, with
    c_i = 2 u E_i and u the gradient at the layer's output. With m_i a prediction of expert i's
    output, c^_i = 2 u m_i predicts c_i for the experts that were not computed, and
    c_D dp~_D + sum_i p~_i c^_i dp~_i - c^_D dp~_D has the same mean wherever u does not depend on
    D, and less variance wherever m_i tells something about E_i. The forward pass is untouched.
    With the full gate dp_i + p_i dlog p~_i takes the place of 2 dp~_i.

    Args:
        prediction: ``"mean"``, the running mean of its outputs, or ``"linear"``, a regression on
            the token (:class:`~fairseq_sparsemixer.moe.adaptation.ExpertLines`).
        mean_decay: weight of the old mean, or of older tokens, in each update.
        **options: see :class:`SparseMixerRouter`.
    """

    def __init__(
        self, *, prediction: str = "mean", mean_decay: float = 0.99, **options: Any
    ) -> None:
        super().__init__(**options)
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be {' or '.join(PREDICTIONS)}, not {prediction!r}")
        self.expert_means = PREDICTIONS[prediction](self.num_experts, self.embed_dim, mean_decay)

    def select(self, logits_TN: Tensor, context: Context) -> Routing:
        """See :meth:`Router.select`."""
        routing = super().select(logits_TN, context)
        if self.training:
            masked_TN, probs_TN = routing.sampling_probs, routing.probs
            expected_TN = masked_TN.detach() - one_hot(routing.expert_index, masked_TN)
            # 0 in the forward pass, exactly.
            slope_TN = masked_TN - masked_TN.detach()
            if self.gate == "masked":
                slope_TN = 2.0 * slope_TN
            else:
                # p~_i = p_i / s with s the sum of p within the mask, so p_i dlog p~_i = s dp~_i.
                within_T1 = (probs_TN.detach() * (masked_TN > 0)).sum(-1, keepdim=True)
                slope_TN = probs_TN - probs_TN.detach() + within_T1 * slope_TN
            routing.mean_gate = expected_TN * slope_TN
        return routing


@register_router("sparsemixer-v2")
class SparseMixerV2Router(_WithOverride):
    """SparseMixer-v2, Heun's third-order method (GRIN, arXiv 2409.12136, algorithm 1).

    f(h) - f(0) ~ (1/4 f'(h) + 3/4 f'(h/3)) h: m is 1 with probability 1/4 and else 1/3, without
    the factor 2: grad_1 is left out. No omega. K experts are drawn without replacement: z_D is set
    to -inf after each draw, and mask, distribution and arg-max are those of what is left.

    As in the code released for Phi-3.5-MoE, m scales the gate, and so the gradient of the expert
    too; algorithm 1 as printed scales the output only. With the full gate: m p_D, of gradient
    p_D dlog p~_D.

    Args:
        jitter_eps: eps of the mask, above 0; a very large value masks nothing.
        first_order_on_argmax: m = 1 wherever D is the arg-max of what is left.
        **options: see :class:`SparseMixerBase` (``gate``).
    """

    max_top_k: Optional[int] = None
    rule = HEUN_OF_CHOICE


@register_router("sparsemixer-v2-star")
class SparseMixerV2StarRouter(SparseMixerV2Router):
    """SparseMixer-v2*, with grad_1 and half the logits (GRIN, arXiv 2409.12136, algorithm 2).

    p~ = softmax(z / 2) over the experts that are not masked; m is 1 with probability 5/8 and else
    1/3; the gradient that reaches p~_D is twice the gradient at the gate. In expectation this is
    the exact gradient for every cubic f where K = 1 and ``first_order_on_argmax`` is off. With the
    full gate, p = softmax(z / 2): 8/5 dp_D + 2/5 p_D dlog p~_D where m = 1, 2 p_D dlog p~_D where
    m = 1/3. Else as :class:`SparseMixerV2Router`.

    Args:
        jitter_eps: eps of the mask, above 0; a very large value masks nothing.
        first_order_on_argmax: m = 1 wherever D is the arg-max of what is left.
        **options: see :class:`SparseMixerBase` (``gate``).
    """

    temperature = 2.0
    rule = HEUN
