"""SparseMixer: a sparse estimate of the whole router gradient (arXiv 2310.00811).

For D ~ p~ and h = p~_D E_D(x), the router's gradient of E[f(h)] is grad_0 + grad_1: grad_1 is what
backpropagation gives, grad_0 = sum_i [f(p~_i E_i) - f(0)] dp~_i comes from the discrete choice.
Both routers here estimate f(h) - f(0) from the one expert that was computed.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fairseq_sparsemixer.moe.routing import Router, Routing, register_router


def unreachable(logits_TN: Tensor, jitter_eps: float) -> Tensor:
    """(T, N) bool: the experts that jitter could not have made the largest.

    Expert i is masked where (max_j z_j - z_i) / max(|z_i|, max_j z_j) > 2 eps (the
    mask of arXiv 2310.00811). Written without the division, which is 0/0 for logits of zero; the
    arg-max is never masked.
    """
    with torch.no_grad():
        max_T1 = logits_TN.amax(dim=-1, keepdim=True)
        scale_TN = torch.maximum(logits_TN.abs(), max_T1)
        return (max_T1 - logits_TN) > 2 * jitter_eps * scale_TN


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
    """What the two orders share: mask, sampling, the factor 2, and omega.

    Evaluation: D = argmax, gate p~_D (the mask stays).
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.output_scale = nn.Parameter(torch.ones(self.embed_dim))

    def select(self, logits_TN: Tensor) -> Routing:
        """See :meth:`Router.select`."""
        masked_TN = logits_TN.masked_fill(unreachable(logits_TN, self.jitter_eps), float("-inf"))
        sampling_probs_TN = masked_TN.softmax(dim=-1)
        best_T1 = logits_TN.argmax(dim=-1, keepdim=True)
        index_T1 = sample(masked_TN) if self.training else best_T1
        gate_T1 = sampling_probs_TN.gather(-1, index_T1)
        if self.training:
            point_T1 = self.evaluation_point(gate_T1, is_best=index_T1 == best_T1)
            gate_T1 = scale_gradient(gate_T1, forward=point_T1, backward=2.0)
        return Routing(
            expert_index=index_T1,
            gate=gate_T1,
            logits=logits_TN,
            probs=logits_TN.softmax(dim=-1),
            sampling_probs=sampling_probs_TN,
        )

    def evaluation_point(self, gate_T1: Tensor, is_best: Tensor) -> Tensor:
        """(T, 1): the factor m of the gate in the forward pass."""
        raise NotImplementedError


@register_router("sparsemixer")
class SparseMixerRouter(_SparseMixerBase):
    """SparseMixer, the mid-point method (Liu et al. 2023, arXiv 2310.00811).

    f(h) - f(0) ~ f'(h/2) h. Sampled: m is 1 or 1/2 with probability 1/2 each, the forward gate is
    m p~_D, and the gradient that reaches p~_D is twice the gradient at the gate. In expectation
    this is the exact gradient for every quadratic f where no expert is masked and
    ``first_order_on_argmax`` is off.

    The expert output is also multiplied by a learned omega in R^D, initially 1, shared by all
    experts (``output_scale``).

    Args:
        jitter_eps: eps of the mask, at least 0; a very large value masks nothing.
        first_order_on_argmax: m = 1 wherever D is the arg-max, so that experts are trained on
            full outputs (the paper's choice; off for ablation).
        **options: see :class:`~fairseq_sparsemixer.moe.Router`.
    """

    def __init__(self, *, first_order_on_argmax: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.first_order_on_argmax = first_order_on_argmax

    def evaluation_point(self, gate_T1: Tensor, is_best: Tensor) -> Tensor:
        """m: 1 or 1/2 with equal probability; 1 at the arg-max under the override."""
        full_T1 = torch.rand_like(gate_T1) < 0.5
        if self.first_order_on_argmax:
            full_T1 = full_T1 | is_best
        return torch.where(full_T1, 1.0, 0.5)


@register_router("sparsemixer-1st")
class SparseMixerFirstOrderRouter(_SparseMixerBase):
    """SparseMixer-1st, the Euler method (arXiv 2310.00811).

    f(h) - f(0) ~ f'(h) h, hence grad_0 ~ grad_1: forward gate p~_D, twice the gradient to p~_D.
    Everything else as in :class:`SparseMixerRouter`, omega included, so that the two differ in
    the order of the estimate only.

    Args:
        jitter_eps: eps of the mask, at least 0; a very large value masks nothing.
        **options: see :class:`~fairseq_sparsemixer.moe.Router`.
    """

    def evaluation_point(self, gate_T1: Tensor, is_best: Tensor) -> Tensor:
        """m: always 1."""
        return torch.ones_like(gate_T1)
