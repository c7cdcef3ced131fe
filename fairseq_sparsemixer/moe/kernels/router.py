"""The routers that choose one expert, from logits to gate in one kernel, and one for the way back.

What a router says in plain PyTorch stays the definition, and serves everything else: this is the
same arithmetic with the same random numbers, drawn by PyTorch in the same order, so that the same
seed gives the same experts and gates (of logits that are equal the first is the largest; PyTorch's
top-k may take another).
"""

from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.kernels.operators import (
    cdiv,
    contiguous,
    next_power_of_2,
    once_differentiable,
    operator,
)
from fairseq_sparsemixer.moe.kernels.products import obstacle

try:
    import triton

    from fairseq_sparsemixer.moe.kernels import router_kernels as kernels
except ImportError:
    triton = None

DEVICES = ("cuda",)
"""Types of the devices whose tensors are served."""


def serves(logits_TN: Tensor, backend: str) -> bool:
    """Whether these kernels take logits, under the layer's choice of a backend.

    They do where the experts' Triton kernels run too and nothing else was asked for.
    """
    if backend not in ("auto", "triton") or logits_TN.device.type not in DEVICES:
        return False
    return obstacle(logits_TN.device, logits_TN.dtype) is None


class FusedEstimator(NamedTuple):
    """How the gate follows from the logits."""

    jitter_eps: Optional[float] = None
    """eps of SparseMixer's mask; None masks nothing."""
    temperature: float = 1.0
    """Of the masked distribution."""
    sampled: bool = False
    """Whether the expert is drawn; else it has the largest logit."""
    points: Tuple[float, float] = (1.0, 1.0)
    """The chance that the gate's factor m is 1, and the other m."""
    full_on_best: bool = False
    """Whether m is always 1 where the expert has the largest logit."""
    gradient_scale: float = 1.0
    """Times the gradient at the gate, the gradient that reaches the probability behind it."""
    gate: str = "chance"
    """What the gate is m times of: "chance", the probability q by which the expert is chosen;
    "full", that of the softmax over all experts; or "one"."""
    slopes: Tuple[float, ...] = ()
    """Unless the gate is "chance": what dg and g dlog q count for in its gradient where m = 1, both
    at the other point, and both where m = 1 because of ``full_on_best``."""


def choose(estimator: FusedEstimator, logits_TN: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """(T, 1) expert and gate; (T, N) softmax of all logits, and the one that the gate is from."""
    noise_TN = uniform_T1 = None
    if estimator.sampled:
        noise_TN = torch.empty_like(logits_TN, memory_format=torch.contiguous_format).exponential_()
        if estimator.points != (1.0, 1.0):
            uniform_T1 = logits_TN.new_empty(logits_TN.shape[0], 1).uniform_()
    index_T1, gate_T1, probs_TN, *masked = _Choice.apply(estimator, logits_TN, noise_TN, uniform_T1)
    return index_T1, gate_T1, probs_TN, masked[0] if masked else probs_TN


class _Choice(torch.autograd.Function):
    """Expert, gate and distributions, of which there is one where nothing is masked."""

    @staticmethod
    def forward(
        ctx: Any,
        estimator: FusedEstimator,
        logits_TN: Tensor,
        noise_TN: Optional[Tensor],
        uniform_T1: Optional[Tensor],
    ) -> Tuple[Tensor, ...]:
        index_T1, gate_T1, *rest = route(
            logits_TN,
            noise_TN,
            uniform_T1,
            estimator.jitter_eps,
            estimator.temperature,
            *estimator.points,
            estimator.full_on_best,
            estimator.gate,
            estimator.slopes,
        )
        ctx.estimator = estimator
        ctx.save_for_backward(index_T1, *rest)
        ctx.mark_non_differentiable(index_T1)
        ctx.set_materialize_grads(False)
        return (index_T1, gate_T1, *(rest[:-1] if estimator.slopes else rest))

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any,
        _: Any,
        d_gate_T1: Optional[Tensor],
        d_probs_TN: Optional[Tensor],
        d_masked_TN: Optional[Tensor] = None,
    ) -> Any:
        estimator = ctx.estimator
        index_T1, probs_TN, *rest = ctx.saved_tensors
        masked_TN = None if estimator.jitter_eps is None else rest[0]
        slope_T2 = rest[-1] if estimator.slopes else None
        d_logits_TN = route_backward(
            *(index_T1, probs_TN, masked_TN, slope_T2, d_gate_T1, d_probs_TN, d_masked_TN),
            estimator.temperature,
            estimator.gradient_scale,
            estimator.gate,
        )
        return None, d_logits_TN, None, None


CELLS = 2048
"""Logits that one program works on."""


def blocks(num_experts: int) -> Tuple[int, int]:
    """Rows and columns of the part of a (T, N) matrix that one program works on."""
    block_n = next_power_of_2(num_experts)
    return max(1, CELLS // block_n), block_n


def _route_like(
    logits: Tensor, noise: Any, uniform: Any, jitter_eps: Optional[float], *more: Any
) -> List[Tensor]:
    num_tokens, num_experts = logits.shape
    gate = logits.new_empty(num_tokens, 1)
    probs = logits.new_empty(num_tokens, num_experts)
    results = [torch.empty_like(gate, dtype=torch.int64), gate, probs]
    if jitter_eps is not None:
        results.append(torch.empty_like(probs))
    if more[-1]:
        results.append(logits.new_empty(num_tokens, 2))
    return results


@operator(_route_like)
def route(
    logits: Tensor,
    noise: Optional[Tensor],
    uniform: Optional[Tensor],
    jitter_eps: Optional[float],
    temperature: float,
    chance: float,
    point: float,
    full_on_best: bool,
    gate: str,
    slopes: Sequence[float],
) -> List[Tensor]:
    """Expert, gate, softmax, masked softmax, slopes: see :class:`FusedEstimator`.

    Args:
        logits: (T, N) float32.
        noise: (T, N) drawn from the exponential distribution; without it the largest is taken.
        uniform: (T, 1) drawn from U(0, 1); without it m is 1.
        jitter_eps: None for no mask, and no masked softmax.
        slopes: none where the gate is the chance, and then no slopes come out.
    """
    results = _route_like(logits, noise, uniform, jitter_eps, slopes)
    num_tokens, num_experts = logits.shape
    block_t, block_n = blocks(num_experts)
    kernels.route_kernel[(cdiv(num_tokens, block_t),)](
        *(logits.contiguous(), noise, uniform, *results[:3]),
        None if jitter_eps is None else results[3],
        results[-1] if slopes else None,
        *(num_tokens, num_experts, min(2 * (jitter_eps or 0.0), 1e30), temperature, chance, point),
        *(slopes or 6 * (0.0,)),
        GATE=gate,
        FULL_ON_BEST=full_on_best,
        BLOCK_T=block_t,
        BLOCK_N=block_n,
    )
    return results


def _route_backward_like(index: Any, probs: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(probs)


@operator(_route_backward_like)
def route_backward(
    index: Tensor,
    probs: Tensor,
    masked: Optional[Tensor],
    slope: Optional[Tensor],
    d_gate: Optional[Tensor],
    d_probs: Optional[Tensor],
    d_masked: Optional[Tensor],
    temperature: float,
    gradient_scale: float,
    gate: str,
) -> Tensor:
    """(T, N): the gradient of the logits; any of the gradients may be missing."""
    d_logits = _route_backward_like(index, probs)
    num_tokens, num_experts = probs.shape
    block_t, block_n = blocks(num_experts)
    kernels.route_backward_kernel[(cdiv(num_tokens, block_t),)](
        *(index, probs, masked, slope),
        *(contiguous(d_gate), contiguous(d_probs), contiguous(d_masked)),
        *(d_logits, num_tokens, num_experts, temperature, gradient_scale),
        GATE=gate,
        BLOCK_T=block_t,
        BLOCK_N=block_n,
    )
    return d_logits
