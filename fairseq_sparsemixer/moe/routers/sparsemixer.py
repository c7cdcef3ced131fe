"""SparseMixer: a sparse estimate of the whole router gradient (arXiv 2310.00811, 2409.12136).

For D ~ p~ and h = p~_D E_D(x), the router's gradient of E[f(h)] is grad_0 + grad_1: grad_1 is what
backpropagation gives, grad_0 = sum_i [f(p~_i E_i) - f(0)] dp~_i comes from the discrete choice.
All routers here estimate f(h) - f(0) from the one expert that was computed: they take f' at m h,
for a random evaluation point m, by scaling the gate in the forward pass and not in the backward
pass.
"""

import math
from typing import Any, Callable, Dict, Optional, Tuple, Union

import torch
from torch import Tensor, nn

from fairseq_sparsemixer.moe.adaptation import ExpertLines, ExpertMeans
from fairseq_sparsemixer.moe.kernels import router as fused_router
from fairseq_sparsemixer.moe.routing import Context, Router, Routing, one_hot, register_router

LEAST_JITTER = 1e-6
"""Less hardly tells two float32 logits apart."""


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
    return logits_TN < torch.sub(max_T1, scale_TN, alpha=2 * jitter_eps)


def sample(logits_TN: Tensor) -> Tensor:
    """(T, 1) int64: one draw for each row from softmax(logits), by Gumbel-max.

    A logit of -inf is never drawn: the noise is kept finite.
    """
    with torch.no_grad():
        exponential_TN = torch.empty_like(logits_TN).exponential_()
        tiny = torch.finfo(logits_TN.dtype).tiny
        return (logits_TN - exponential_TN.clamp_min(tiny).log()).argmax(dim=-1, keepdim=True)


def scale_gradient(value: Tensor, forward: Any, backward: float) -> Tensor:
    """``forward * value`` exactly, with ``backward`` times the gradient going to ``value``."""
    detached = value.detach()
    return forward * detached + backward * (value - detached)


class _SparseMixerBase(Router):
    """What all share: the mask, sampling without replacement, and the gate.

    Evaluation: the largest logits, gates p~ (the mask stays).
    """

    gradient_scale = 2.0
    """Times the gradient at the gate, the gradient that reaches p~_D."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.jitter_eps < LEAST_JITTER and self.num_experts > 1:
            raise ValueError(
                f"jitter_eps must be at least {LEAST_JITTER} for router {self.name!r}, not "
                f"{self.jitter_eps}: the mask would leave one expert, with gate 1, and the router "
                "without a gradient"
            )

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
            probs=logits_TN.softmax(dim=-1),
            sampling_probs=probs_TN,
        )

    def _draw(self, left_TN: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """One of the experts that are left: its (T, 1) index and gate, and the (T, N) p~."""
        detached_TN = left_TN.detach()
        max_T1, best_T1 = detached_TN.max(dim=-1, keepdim=True)
        masked_out_TN = unreachable(detached_TN, max_T1, self.jitter_eps)
        masked_TN = left_TN.masked_fill(masked_out_TN, -math.inf)
        if self.temperature != 1:
            masked_TN = masked_TN / self.temperature
        probs_TN = masked_TN.softmax(dim=-1)
        if not self.training:
            return best_T1, probs_TN.gather(-1, best_T1), probs_TN
        index_T1 = sample(masked_TN)
        gate_T1 = probs_TN.gather(-1, index_T1)
        point_T1 = self.evaluation_point(gate_T1, is_best=index_T1 == best_T1)
        gate_T1 = scale_gradient(gate_T1, forward=point_T1, backward=self.gradient_scale)
        return index_T1, gate_T1, probs_TN

    def evaluation_point(self, gate_T1: Tensor, is_best: Tensor) -> Tensor:
        """(T, 1): the factor m of the gate in the forward pass."""
        raise NotImplementedError

    def fused_estimator(self) -> Optional[fused_router.FusedEstimator]:
        """What :meth:`select` computes, for the kernels that do the same; None for what has none.

        A subclass that changes :meth:`evaluation_point` changes :meth:`fused_points` too.
        """
        if self.top_k > 1:
            return None
        if not self.training:
            return fused_router.FusedEstimator(self.jitter_eps, self.temperature)
        points, full_on_best = self.fused_points()
        return fused_router.FusedEstimator(
            self.jitter_eps, self.temperature, True, points, full_on_best, self.gradient_scale
        )

    def fused_points(self) -> Tuple[Tuple[float, float], bool]:
        """``points`` and ``full_on_best`` of the fused estimator, for :meth:`evaluation_point`."""
        return (1.0, 1.0), False


class _TwoPoints(_SparseMixerBase):
    """m is 1 with some probability and else another point."""

    chance_of_full = 0.5
    """Probability of m = 1."""
    point = 0.5
    """The other m."""

    def __init__(self, *, first_order_on_argmax: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.first_order_on_argmax = first_order_on_argmax

    def evaluation_point(self, gate_T1: Tensor, is_best: Tensor) -> Tensor:
        """m: 1 or the other point; 1 at the arg-max under the override."""
        full_T1 = torch.rand_like(gate_T1) < self.chance_of_full
        if self.first_order_on_argmax:
            full_T1 = full_T1 | is_best
        return torch.where(full_T1, 1.0, self.other_point(gate_T1))

    def other_point(self, gate_T1: Tensor) -> Tensor:
        """(T, 1) or (): m where it is not 1."""
        return gate_T1.new_full((), self.point)

    def fused_points(self) -> Tuple[Tuple[float, float], bool]:
        """See :class:`_SparseMixerBase`."""
        return (self.chance_of_full, self.point), self.first_order_on_argmax


@register_router("sparsemixer-1st")
class SparseMixerFirstOrderRouter(_SparseMixerBase):
    """SparseMixer-1st, the Euler method (arXiv 2310.00811).

    f(h) - f(0) ~ f'(h) h, hence grad_0 ~ grad_1: forward gate p~_D, twice the gradient to p~_D.
    Everything else as in :class:`SparseMixerRouter`, omega included, so that the two differ in
    the order of the estimate only.

    Args:
        jitter_eps: eps of the mask, above 0; a very large value masks nothing.
        omega: whether the output is multiplied by a learned omega.
        **options: see :class:`~fairseq_sparsemixer.moe.Router`.
    """

    def __init__(self, *, omega: bool = True, **options: Any) -> None:
        super().__init__(**options)
        if omega:
            self.output_scale = nn.Parameter(torch.ones(self.embed_dim))

    def evaluation_point(self, gate_T1: Tensor, is_best: Tensor) -> Tensor:
        """m: always 1."""
        return torch.ones_like(gate_T1)


@register_router("sparsemixer")
class SparseMixerRouter(_TwoPoints):
    """SparseMixer, the mid-point method (Liu et al. 2023, arXiv 2310.00811).

    f(h) - f(0) ~ f'(h/2) h. Sampled: m is 1 or 1/2 with probability 1/2 each, the forward gate is
    m p~_D, and the gradient that reaches p~_D is twice the gradient at the gate. In expectation
    this is the exact gradient for every quadratic f where no expert is masked and
    ``first_order_on_argmax`` is off.

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
        **options: see :class:`~fairseq_sparsemixer.moe.Router`.
    """

    def __init__(self, *, omega: bool = True, quadrature: str = "midpoint", **options: Any) -> None:
        super().__init__(**options)
        if quadrature not in ("midpoint", "uniform"):
            raise ValueError(f"quadrature must be midpoint or uniform, not {quadrature!r}")
        self.quadrature = quadrature
        if omega:
            self.output_scale = nn.Parameter(torch.ones(self.embed_dim))

    def other_point(self, gate_T1: Tensor) -> Tensor:
        """1/2, or a draw from U(0, 1)."""
        if self.quadrature == "midpoint":
            return super().other_point(gate_T1)
        return torch.rand_like(gate_T1)

    def fused_estimator(self) -> Optional[fused_router.FusedEstimator]:
        """See :class:`_SparseMixerBase`."""
        return super().fused_estimator() if self.quadrature == "midpoint" else None


PREDICTIONS: Dict[str, Callable[..., Union[ExpertMeans, ExpertLines]]] = {
    "mean": ExpertMeans,
    "linear": ExpertLines,
}
"""What a control variate may know of the experts that were not computed."""


@register_router("sparsemixer-cv")
class SparseMixerControlVariateRouter(SparseMixerRouter):
    """SparseMixer with a control variate: of this project, see docs/routers.md.

    SparseMixer's gradient for a token is one sample c_D dp~_D of sum_i p~_i c_i dp~_i, with
    c_i = 2 u E_i and u the gradient at the layer's output. With m_i the running mean of expert i's
    output, c^_i = 2 u m_i predicts c_i for the experts that were not computed, and
    c_D dp~_D + sum_i p~_i c^_i dp~_i - c^_D dp~_D has the same mean wherever u does not depend on
    D, and less variance wherever m_i tells something about E_i. The forward pass is untouched.

    Args:
        mean_decay: weight of the old mean in each update.
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
            probs_TN = routing.sampling_probs
            expected_TN = probs_TN.detach() - one_hot(routing.expert_index, probs_TN)
            # 0 in the forward pass, exactly.
            routing.mean_gate = self.gradient_scale * expected_TN * (probs_TN - probs_TN.detach())
        return routing


@register_router("sparsemixer-v2")
class SparseMixerV2Router(_TwoPoints):
    """SparseMixer-v2, Heun's third-order method (GRIN, arXiv 2409.12136, algorithm 1).

    f(h) - f(0) ~ (1/4 f'(h) + 3/4 f'(h/3)) h: m is 1 with probability 1/4 and else 1/3, without
    the factor 2: grad_1 is left out. No omega. K experts are drawn without replacement: z_D is set
    to -inf after each draw, and mask, distribution and arg-max are those of what is left.

    As in the code released for Phi-3.5-MoE, m scales the gate, and so the gradient of the expert
    too; algorithm 1 as printed scales the output only.

    Args:
        jitter_eps: eps of the mask, above 0; a very large value masks nothing.
        first_order_on_argmax: m = 1 wherever D is the arg-max of what is left.
        **options: see :class:`~fairseq_sparsemixer.moe.Router`.
    """

    max_top_k: Optional[int] = None
    gradient_scale = 1.0
    chance_of_full = 0.25
    point = 1 / 3


@register_router("sparsemixer-v2-star")
class SparseMixerV2StarRouter(SparseMixerV2Router):
    """SparseMixer-v2*, with grad_1 and half the logits (GRIN, arXiv 2409.12136, algorithm 2).

    p~ = softmax(z / 2) over the experts that are not masked; m is 1 with probability 5/8 and else
    1/3; the gradient that reaches p~_D is twice the gradient at the gate. In expectation this is
    the exact gradient for every cubic f where K = 1, no expert is masked and
    ``first_order_on_argmax`` is off. Else as :class:`SparseMixerV2Router`.

    Args:
        jitter_eps: eps of the mask, above 0; a very large value masks nothing.
        first_order_on_argmax: m = 1 wherever D is the arg-max of what is left.
        **options: see :class:`~fairseq_sparsemixer.moe.Router`.
    """

    temperature = 2.0
    gradient_scale = 2.0
    chance_of_full = 0.625
