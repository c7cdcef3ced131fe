"""Triton kernels of :mod:`fairseq_sparsemixer.moe.kernels.projection`."""

# mypy: allow-untyped-defs
# Types of a kernel's arguments are made up by Triton for each call.

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_tokens"])
def project_kernel(
    x_ptr,  # (T, D)
    w_ptr,  # (N, D)
    bias_ptr,  # (N,) or None
    z_ptr,  # (T, N)
    num_tokens,
    num_experts,
    width,  # D
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Logits of BLOCK_T tokens and BLOCK_N experts."""
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    expert = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_token, is_expert = token < num_tokens, expert < num_experts
    z = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        x = tl.load(
            x_ptr + token[:, None] * width + column[None, :],
            mask=is_token[:, None] & (column < width)[None, :],
            other=0.0,
        )
        w = tl.load(
            w_ptr + expert[None, :] * width + column[:, None],
            mask=is_expert[None, :] & (column < width)[:, None],
            other=0.0,
        )
        z = tl.dot(x.to(tl.float32), w.to(tl.float32), z, input_precision="tf32x3")
    if bias_ptr is not None:
        z += tl.load(bias_ptr + expert, mask=is_expert, other=0.0).to(tl.float32)[None, :]
    tl.store(
        z_ptr + token[:, None] * num_experts + expert[None, :],
        z,
        mask=is_token[:, None] & is_expert[None, :],
    )


@triton.jit(do_not_specialize=["num_tokens"])
def token_gradient_kernel(
    d_z_ptr,  # (T, N)
    w_ptr,  # (N, D) float32
    d_x_ptr,  # (T, D)
    num_tokens,
    num_experts,
    width,  # D
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradient of BLOCK_D columns of BLOCK_T tokens."""
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_token, is_column = token < num_tokens, column < width
    d_x = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for start in range(0, num_experts, BLOCK_N):
        expert = start + tl.arange(0, BLOCK_N)
        is_expert = expert < num_experts
        d_z = tl.load(
            d_z_ptr + token[:, None] * num_experts + expert[None, :],
            mask=is_token[:, None] & is_expert[None, :],
            other=0.0,
        )
        w = tl.load(
            w_ptr + expert[:, None] * width + column[None, :],
            mask=is_expert[:, None] & is_column[None, :],
            other=0.0,
        )
        d_x = tl.dot(d_z, w, d_x, input_precision="ieee")
    tl.store(
        d_x_ptr + token[:, None] * width + column[None, :],
        d_x,
        mask=is_token[:, None] & is_column[None, :],
    )


@triton.jit(do_not_specialize=["num_tokens", "tokens_of_part"])
def weight_gradient_kernel(
    d_z_ptr,  # (T, N)
    x_ptr,  # (T, D)
    d_w_ptr,  # (parts, N, D), to be added up
    d_b_ptr,  # (parts, N), to be added up
    num_tokens,
    num_experts,
    width,  # D
    tokens_of_part,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradients of BLOCK_N experts' weights, BLOCK_D columns, and biases from some tokens."""
    part = tl.program_id(0)
    expert = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_expert, is_column = expert < num_experts, column < width
    first = part * tokens_of_part
    end = tl.minimum(first + tokens_of_part, num_tokens)
    d_w = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    d_b = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(first, end, BLOCK_T):
        token = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        is_token = token < end
        d_z = tl.load(
            d_z_ptr + token[None, :] * num_experts + expert[:, None],
            mask=is_token[None, :] & is_expert[:, None],
            other=0.0,
        )
        x = tl.load(
            x_ptr + token[:, None] * width + column[None, :],
            mask=is_token[:, None] & is_column[None, :],
            other=0.0,
        )
        d_w = tl.dot(d_z, x.to(tl.float32), d_w, input_precision="tf32x3")
        d_b += tl.sum(d_z, 1)
    tl.store(
        d_w_ptr + (part * num_experts + expert[:, None]) * width + column[None, :],
        d_w,
        mask=is_expert[:, None] & is_column[None, :],
    )
    if tl.program_id(2) == 0:
        tl.store(d_b_ptr + part * num_experts + expert, d_b, mask=is_expert)
