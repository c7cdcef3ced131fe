"""The routers' logits, from tokens of any dtype and without a copy of them in float32.

``x.float() @ W.float().T + b`` in plain PyTorch stays the definition. Products are formed from
three of TF32, which together hold as many digits as float32, and gradients of the weights as sums
in a fixed order.
"""

from typing import Any, Optional, Tuple

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.kernels.operators import (
    cdiv,
    contiguous,
    next_power_of_2,
    once_differentiable,
    operator,
)

try:
    import triton

    from fairseq_sparsemixer.moe.kernels import projection_kernels as kernels
except ImportError:
    triton = None

BLOCK_T = 64
"""Tokens that one program works on at a time."""
BLOCK_D = 64
MOST_EXPERTS = 64
"""Experts that it works on at a time."""
PARTS = 32
"""Of the tokens, whose parts of the weights' gradient are added up."""


def project(x_TD: Tensor, weight_ND: Tensor, bias_N: Optional[Tensor]) -> Tensor:
    """(T, N) float32: z = x W^T + b."""
    return _Project.apply(x_TD, weight_ND, bias_N)


class _Project(torch.autograd.Function):
    """The logits and their way back."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ND: Tensor, bias_N: Optional[Tensor]) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ND)
        ctx.bias_dtype = None if bias_N is None else bias_N.dtype
        return logits_of(x_TD, weight_ND, bias_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logits_TN: Tensor) -> Any:  # type: ignore[override]
        x_TD, weight_ND = ctx.saved_tensors
        needs_x, *needs_weights = ctx.needs_input_grad
        d_x_TD = d_weight_ND = d_bias_N = None
        if needs_x:
            d_x_TD = token_gradient(d_logits_TN, weight_ND, x_TD.dtype)
        if any(needs_weights):
            d_weight_ND, d_bias_N = logits_weight_gradient(d_logits_TN, x_TD)
            d_weight_ND = d_weight_ND.to(weight_ND.dtype)
            d_bias_N = None if ctx.bias_dtype is None else d_bias_N.to(ctx.bias_dtype)
        return d_x_TD, d_weight_ND, d_bias_N


def _experts_of_block(num_experts: int) -> int:
    return min(MOST_EXPERTS, max(16, next_power_of_2(num_experts)))


def _logits_of_like(x: Tensor, weight: Tensor, bias: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


@operator(_logits_of_like)
def logits_of(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """(T, N) float32: x W^T + b.

    Args:
        x: (T, D).
        weight: (N, D).
        bias: (N,).
    """
    logits = _logits_of_like(x, weight, bias)
    (num_tokens, num_experts), width = logits.shape, x.shape[1]
    block_n = _experts_of_block(num_experts)
    kernels.project_kernel[(max(1, cdiv(num_tokens, BLOCK_T)), cdiv(num_experts, block_n))](
        *(x.contiguous(), weight.contiguous(), contiguous(bias), logits),
        *(num_tokens, num_experts, width),
        BLOCK_T=BLOCK_T,
        BLOCK_N=block_n,
        BLOCK_D=BLOCK_D,
    )
    return logits


def _token_gradient_like(d_logits: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return d_logits.new_empty(d_logits.shape[0], weight.shape[1], dtype=dtype)


@operator(_token_gradient_like)
def token_gradient(d_logits: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, D) of a dtype: the gradient of x, from those of the logits (T, N) and W (N, D)."""
    d_x = _token_gradient_like(d_logits, weight, dtype)
    num_tokens, num_experts = d_logits.shape
    width = weight.shape[1]
    kernels.token_gradient_kernel[(max(1, cdiv(num_tokens, BLOCK_T)), cdiv(width, BLOCK_D))](
        # Converted by the kernel, weights of 16 bits took five times as long.
        *(d_logits.contiguous(), weight.float().contiguous(), d_x),
        *(num_tokens, num_experts, width),
        BLOCK_T=BLOCK_T,
        BLOCK_N=_experts_of_block(num_experts),
        BLOCK_D=BLOCK_D,
        num_stages=2,
    )
    return d_x


def _logits_weight_gradient_like(d_logits: Tensor, x: Tensor) -> Tuple[Tensor, Tensor]:
    num_experts = d_logits.shape[1]
    return d_logits.new_empty(num_experts, x.shape[1]), d_logits.new_empty(num_experts)


@operator(_logits_weight_gradient_like)
def logits_weight_gradient(d_logits: Tensor, x: Tensor) -> Tuple[Tensor, Tensor]:
    """(N, D), (N,) float32: the gradients of W and b, from those of the logits (T, N), x (T, D)."""
    (num_tokens, num_experts), width = d_logits.shape, x.shape[1]
    block_n = _experts_of_block(num_experts)
    tokens_of_part = max(BLOCK_T, cdiv(num_tokens, PARTS))
    parts = max(1, cdiv(num_tokens, tokens_of_part))
    d_weight = d_logits.new_empty(parts, num_experts, width)
    d_bias = d_logits.new_empty(parts, num_experts)
    kernels.weight_gradient_kernel[(parts, cdiv(num_experts, block_n), cdiv(width, BLOCK_D))](
        *(d_logits.contiguous(), x.contiguous(), d_weight, d_bias),
        *(num_tokens, num_experts, width, tokens_of_part),
        BLOCK_T=BLOCK_T,
        BLOCK_N=block_n,
        BLOCK_D=BLOCK_D,
    )
    return d_weight.sum(0), d_bias.sum(0)
