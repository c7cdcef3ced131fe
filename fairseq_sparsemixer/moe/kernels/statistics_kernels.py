"""Triton kernels of :mod:`fairseq_sparsemixer.moe.kernels.statistics`."""

# mypy: allow-untyped-defs
# Types of a kernel's arguments are made up by Triton for each call.

import triton
import triton.language as tl


@triton.jit
def _logsumexp(z):
    """Of each row, infinite where PyTorch's is; cells outside of the matrix hold -inf."""
    top = tl.max(z, 1)
    top = tl.where(tl.abs(top) == float("inf"), 0.0, top)
    return top + tl.log(tl.sum(tl.exp(z - top[:, None]), 1))


@triton.jit
def _keep(padding_ptr, token, is_token):
    """1 for each token, 0 for padding and outside of the matrix."""
    if padding_ptr is not None:
        is_token = is_token & (tl.load(padding_ptr + token, mask=is_token, other=1) == 0)
    return is_token.to(tl.float32)


@triton.jit(do_not_specialize=["num_tokens"])
def sum_tokens_kernel(
    z_ptr,  # (T, N)
    probs_ptr,  # (T, N)
    sampling_probs_ptr,  # (T, N), None where they are probs
    load_ptr,  # (T, N), None where it is sampling_probs
    index_ptr,  # (T, K) any strides, -1 where there is none
    padding_ptr,  # (T,) bool or None
    sums_ptr,  # (programs, 3 + 4 N)
    num_tokens,
    num_experts,
    top_k,
    index_stride_token,
    index_stride_slot,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The packed sums of BLOCK_T tokens; BLOCK_N is no less than N.

    Padding is multiplied by 0, as in the definition: not a number stays visible there too.
    """
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    column = tl.arange(0, BLOCK_N)
    is_token = token < num_tokens
    is_column = column < num_experts
    is_cell = is_token[:, None] & is_column[None, :]
    cell = token[:, None] * num_experts + column[None, :]
    keep = _keep(padding_ptr, token, is_token)
    z = tl.load(z_ptr + cell, mask=is_cell, other=float("-inf"))
    probs = tl.load(probs_ptr + cell, mask=is_cell, other=0.0)
    logsumexp = _logsumexp(z)
    entropy = logsumexp - tl.sum(tl.where(is_cell, probs * z, 0.0), 1)

    sums_ptr += tl.program_id(0) * (3 + 4 * num_experts)
    tl.store(sums_ptr, tl.sum(keep, 0))
    tl.store(sums_ptr + 1, tl.sum(tl.where(is_token, logsumexp * logsumexp * keep, 0.0), 0))
    tl.store(sums_ptr + 2, tl.sum(tl.where(is_token, entropy * keep, 0.0), 0))

    sums_ptr += 3 + column
    times_chosen = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for slot in range(top_k):
        place = token * index_stride_token + slot * index_stride_slot
        index = tl.load(index_ptr + place, mask=is_token, other=-1)
        times_chosen += (index[:, None] == column[None, :]).to(tl.float32)
    tl.store(sums_ptr, tl.sum(times_chosen, 0), mask=is_column)

    sum_probs = tl.sum(probs * keep[:, None], 0)
    tl.store(sums_ptr + num_experts, sum_probs, mask=is_column)
    if sampling_probs_ptr is not None:
        sampling_probs = tl.load(sampling_probs_ptr + cell, mask=is_cell, other=0.0)
        sum_probs = tl.sum(sampling_probs * keep[:, None], 0)
    tl.store(sums_ptr + 2 * num_experts, sum_probs, mask=is_column)
    if load_ptr is not None:
        load = tl.load(load_ptr + cell, mask=is_cell, other=0.0)
        sum_probs = tl.sum(load * keep[:, None], 0)
    tl.store(sums_ptr + 3 * num_experts, sum_probs, mask=is_column)


@triton.jit(do_not_specialize=["num_tokens"])
def sum_tokens_backward_kernel(
    z_ptr,  # (T, N)
    padding_ptr,  # (T,) bool or None
    d_sums_ptr,  # (3 + 4 N,)
    d_z_ptr,  # (T, N)
    d_probs_ptr,  # (T, N)
    d_sampling_probs_ptr,  # (T, N), None where they are probs
    d_load_ptr,  # (T, N), None where it is sampling_probs
    num_tokens,
    num_experts,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradients of BLOCK_T tokens; of the counts and the entropy nothing flows back."""
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    column = tl.arange(0, BLOCK_N)
    is_token = token < num_tokens
    is_column = column < num_experts
    is_cell = is_token[:, None] & is_column[None, :]
    cell = token[:, None] * num_experts + column[None, :]
    keep = _keep(padding_ptr, token, is_token)
    z = tl.load(z_ptr + cell, mask=is_cell, other=float("-inf"))
    logsumexp = _logsumexp(z)
    d_logsumexp = tl.load(d_sums_ptr + 1) * keep * 2 * logsumexp
    d_z = d_logsumexp[:, None] * tl.exp(z - logsumexp[:, None])
    tl.store(d_z_ptr + cell, d_z, mask=is_cell)

    d_sums_ptr += 3 + column
    # What was read in place of another gets that one's gradient too.
    d_sum = tl.load(d_sums_ptr + 3 * num_experts, mask=is_column, other=0.0)
    if d_load_ptr is not None:
        tl.store(d_load_ptr + cell, keep[:, None] * d_sum[None, :], mask=is_cell)
        d_sum = tl.zeros_like(d_sum)
    d_sum += tl.load(d_sums_ptr + 2 * num_experts, mask=is_column, other=0.0)
    if d_sampling_probs_ptr is not None:
        tl.store(d_sampling_probs_ptr + cell, keep[:, None] * d_sum[None, :], mask=is_cell)
        d_sum = tl.zeros_like(d_sum)
    d_sum += tl.load(d_sums_ptr + num_experts, mask=is_column, other=0.0)
    tl.store(d_probs_ptr + cell, keep[:, None] * d_sum[None, :], mask=is_cell)
