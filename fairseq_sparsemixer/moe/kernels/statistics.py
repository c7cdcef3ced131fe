"""The sums of :class:`~fairseq_sparsemixer.moe.RoutingStatistics` in two kernels, one a way.

``RoutingStatistics.from_routing`` in plain PyTorch stays the definition, and serves everything
else. Programs write sums of their tokens, which are then added up in a fixed order: the same
routing always gives the same bits.
"""

from typing import Any, Optional, Tuple

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.kernels.operators import (
    cdiv,
    contiguous,
    once_differentiable,
    operator,
)
from fairseq_sparsemixer.moe.kernels.router import blocks
from fairseq_sparsemixer.moe.routing import Routing

try:
    import triton

    from fairseq_sparsemixer.moe.kernels import statistics_kernels as kernels
except ImportError:
    triton = None


def pack(routing: Routing) -> Tensor:
    """(3 + 4N,): what ``RoutingStatistics.from_routing(routing).pack()`` is."""
    probs_TN, sampling_probs_TN = routing.probs, routing.sampling_probs
    return _Sums.apply(
        routing.logits,
        probs_TN,
        None if sampling_probs_TN is probs_TN else sampling_probs_TN,
        routing.load,
        routing.chosen,
        routing.padding_mask,
    )


class _Sums(torch.autograd.Function):
    """Without gradient of what is counted, and of the entropy."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TN: Tensor,
        probs_TN: Tensor,
        sampling_probs_TN: Optional[Tensor],
        load_TN: Optional[Tensor],
        chosen_TK: Tensor,
        padding_T: Optional[Tensor],
    ) -> Tensor:
        ctx.has_sampling_probs = sampling_probs_TN is not None
        ctx.has_load = load_TN is not None
        ctx.save_for_backward(logits_TN, padding_T)
        return sum_tokens(logits_TN, probs_TN, sampling_probs_TN, load_TN, chosen_TK, padding_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_sums: Tensor) -> Any:  # type: ignore[override]
        logits_TN, padding_T = ctx.saved_tensors
        d_logits_TN, d_probs_TN, d_sampling_probs_TN, d_load_TN = sum_tokens_backward(
            logits_TN, padding_T, d_sums, ctx.has_sampling_probs, ctx.has_load
        )
        return (
            d_logits_TN,
            d_probs_TN,
            d_sampling_probs_TN if ctx.has_sampling_probs else None,
            d_load_TN if ctx.has_load else None,
            None,
            None,
        )


def _sum_tokens_like(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(3 + 4 * logits.shape[1])


@operator(_sum_tokens_like)
def sum_tokens(
    logits: Tensor,
    probs: Tensor,
    sampling_probs: Optional[Tensor],
    load: Optional[Tensor],
    chosen: Tensor,
    padding: Optional[Tensor],
) -> Tensor:
    """(3 + 4N,): see :func:`pack`.

    Args:
        logits: (T, N) float32.
        probs: (T, N) float32.
        sampling_probs: (T, N) float32; None where it is ``probs``.
        load: (T, N) float32; None where it is ``sampling_probs``.
        chosen: (T, K) int64, -1 where there is none.
        padding: (T,) bool; None where there is none.
    """
    num_tokens, num_experts = logits.shape
    block_t, block_n = blocks(num_experts)
    programs = cdiv(num_tokens, block_t)
    partial = logits.new_empty(programs, 3 + 4 * num_experts)
    kernels.sum_tokens_kernel[(programs,)](
        *(contiguous(cells) for cells in (logits, probs, sampling_probs, load)),
        *(chosen, contiguous(padding), partial),
        *(num_tokens, num_experts, chosen.shape[1], *chosen.stride()),
        BLOCK_T=block_t,
        BLOCK_N=block_n,
    )
    return partial.sum(0)


def _sum_tokens_backward_like(
    logits: Tensor, padding: Any, d_sums: Any, has_sampling_probs: bool, has_load: bool
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    exists = (True, True, has_sampling_probs, has_load)
    first, second, third, fourth = (logits.new_empty(logits.shape if e else 0) for e in exists)
    return first, second, third, fourth


@operator(_sum_tokens_backward_like)
def sum_tokens_backward(
    logits: Tensor,
    padding: Optional[Tensor],
    d_sums: Tensor,
    has_sampling_probs: bool,
    has_load: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """(T, N) each: the gradients of the first four arguments; without a cell where one was None."""
    gradients = _sum_tokens_backward_like(logits, padding, d_sums, has_sampling_probs, has_load)
    d_logits, d_probs, d_sampling_probs, d_load = gradients
    num_tokens, num_experts = logits.shape
    block_t, block_n = blocks(num_experts)
    kernels.sum_tokens_backward_kernel[(cdiv(num_tokens, block_t),)](
        *(contiguous(logits), contiguous(padding), d_sums.contiguous(), d_logits, d_probs),
        d_sampling_probs if has_sampling_probs else None,
        d_load if has_load else None,
        *(num_tokens, num_experts),
        BLOCK_T=block_t,
        BLOCK_N=block_n,
    )
    return gradients
