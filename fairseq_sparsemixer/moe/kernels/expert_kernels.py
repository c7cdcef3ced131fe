"""Triton kernels of the backend ``triton``.

Slots are sorted by expert (:mod:`fairseq_sparsemixer.moe.slots`). The rows of each expert
are cut into tiles; a program finds the expert of its tile from the experts' ends, so the grid has a
size that does not depend on the routing. Slots without an expert are a last group, whose results
are zeros. Sums are formed in float32.
"""

# mypy: allow-untyped-defs
# Types of a kernel's arguments are made up by Triton for each call.

import triton
import triton.language as tl


@triton.jit
def _tile(end_ptr, num_slots, num_experts, BLOCK: tl.constexpr, GROUPS: tl.constexpr):
    """Group, first row and end of the rows of this program; no rows where there is nothing to do.

    GROUPS is a power of two above ``num_experts``.
    """
    tile = tl.program_id(0)
    group = tl.arange(0, GROUPS)
    start = tl.load(end_ptr + group - 1, mask=(group > 0) & (group <= num_experts), other=0)
    end = tl.load(end_ptr + group, mask=group < num_experts, other=0)
    end = tl.where(group == num_experts, num_slots, end)
    tiles = (end - start + BLOCK - 1) // BLOCK
    before = tl.cumsum(tiles, 0) - tiles
    here = (before <= tile) & (tile < before + tiles)
    first = start + (tile - before) * BLOCK
    return (
        tl.sum(tl.where(here, group, 0), 0),
        tl.sum(tl.where(here, first, 0), 0),
        tl.sum(tl.where(here, end, 0), 0),
    )


@triton.jit(do_not_specialize=["num_slots"])
def product_kernel(
    a_ptr,  # (., I) any strides
    a_row_ptr,  # (S,) the row of a for each slot; None where a is sorted
    w_ptr,  # (N, O, I) any strides
    bias_ptr,  # (N, O) or None
    seed_ptr,  # (1,) of the dropout, or None
    active_ptr,  # (S, O) result of the ReLU and dropout to go back through, or None
    out_ptr,  # (S, O) sorted result, or None
    placed_ptr,  # (S, O) result times gate and scale where the slots come from, or None
    slot_ptr,  # (S,) where they come from
    gate_ptr,  # (S,) as they come, or None
    scale_ptr,  # (O,) or None
    end_ptr,  # (N,)
    num_slots,
    num_experts,
    width,  # O
    depth,  # I
    a_stride_row,
    a_stride_depth,
    w_stride_expert,
    w_stride_width,
    w_stride_depth,
    kept_share,  # of the dropout
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """a_s w_i^T + bias_i with the expert i of each slot s, and what follows it element by element.

    One program computes BLOCK_S slots of one expert by BLOCK_O columns.
    """
    expert, first, end = _tile(end_ptr, num_slots, num_experts, BLOCK_S, GROUPS)
    if first >= end:
        return
    row = (first + tl.arange(0, BLOCK_S)).to(tl.int64)
    column = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    is_row, is_column = row < end, column < width
    is_cell = is_row[:, None] & is_column[None, :]
    cell = row[:, None] * width + column[None, :]
    a_row = row
    if a_row_ptr is not None:
        a_row = tl.load(a_row_ptr + row, mask=is_row, other=0)
    a_ptr += a_row[:, None] * a_stride_row
    w_ptr += expert.to(tl.int64) * w_stride_expert + column[None, :] * w_stride_width
    has_expert = expert < num_experts

    value = tl.zeros((BLOCK_S, BLOCK_O), tl.float32)
    for start in range(0, tl.where(has_expert, depth, 0), BLOCK_I):
        inner = start + tl.arange(0, BLOCK_I)
        a = tl.load(
            a_ptr + inner[None, :] * a_stride_depth,
            mask=is_row[:, None] & (inner[None, :] < depth),
            other=0.0,
        )
        w = tl.load(
            w_ptr + inner[:, None] * w_stride_depth,
            mask=(inner[:, None] < depth) & is_column[None, :],
            other=0.0,
        )
        value = tl.dot(a, w, value, input_precision=PRECISION)

    if bias_ptr is not None:
        bias = tl.load(
            bias_ptr + expert * width + column, mask=is_column & has_expert, other=0.0
        ).to(tl.float32)
        value += bias[None, :]
    if RELU:
        value = tl.where(value < 0, 0.0, value)  # leaves NaN, which tl.maximum would not
    if seed_ptr is not None:
        kept = tl.rand(tl.load(seed_ptr), cell.to(tl.int32)) < kept_share
        value = tl.where(kept, value / kept_share, 0.0)
    if active_ptr is not None:
        active = tl.load(active_ptr + cell, mask=is_cell, other=0.0)
        value = tl.where(active <= 0, 0.0, value / kept_share)
    if out_ptr is not None:
        tl.store(out_ptr + cell, value, mask=is_cell)
    if placed_ptr is not None:
        slot = tl.load(slot_ptr + row, mask=is_row, other=0)
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + slot, mask=is_row & has_expert, other=0.0).to(tl.float32)
            value *= gate[:, None]
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + column, mask=is_column, other=0.0).to(tl.float32)
            value *= scale[None, :]
        tl.store(placed_ptr + slot[:, None] * width + column[None, :], value, mask=is_cell)


@triton.jit
def weight_gradient_kernel(
    grad_ptr,  # (S, O) contiguous
    a_ptr,  # (., I) any strides
    a_row_ptr,  # (S,) the row of a for each slot; None where a is sorted
    d_w_ptr,  # (N, O, I)
    d_b_ptr,  # (N, O)
    end_ptr,  # (N,)
    width,  # O
    depth,  # I
    a_stride_row,
    a_stride_depth,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """grad^T a over the slots of each expert, and the sum of its grad.

    One program computes BLOCK_O by BLOCK_I weights of one expert from all of its slots.
    """
    expert = tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(depth, BLOCK_I)
    column = tl.program_id(0) // tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    inner = tl.program_id(0) % tiles * BLOCK_I + tl.arange(0, BLOCK_I)
    is_column, is_inner = column < width, inner < depth
    first = tl.load(end_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(end_ptr + expert)

    d_w = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    d_b = tl.zeros((BLOCK_O,), tl.float32)
    for start in range(first, end, BLOCK_S):
        row = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
        is_row = row < end
        grad = tl.load(
            grad_ptr + row[None, :] * width + column[:, None],
            mask=is_column[:, None] & is_row[None, :],
            other=0.0,
        )
        a_row = row
        if a_row_ptr is not None:
            a_row = tl.load(a_row_ptr + row, mask=is_row, other=0)
        a = tl.load(
            a_ptr + a_row[:, None] * a_stride_row + inner[None, :] * a_stride_depth,
            mask=is_row[:, None] & is_inner[None, :],
            other=0.0,
        )
        d_w = tl.dot(grad, a, d_w, input_precision=PRECISION)
        d_b += tl.sum(grad.to(tl.float32), 1)

    tl.store(
        d_w_ptr + (expert * width + column[:, None]) * depth + inner[None, :],
        d_w,
        mask=is_column[:, None] & is_inner[None, :],
    )
    if tl.program_id(0) % tiles == 0:
        tl.store(d_b_ptr + expert * width + column, d_b, mask=is_column)


@triton.jit(do_not_specialize=["num_slots"])
def weigh_backward_kernel(
    grad_ptr,  # (T, D) any strides
    out_ptr,  # (S, D) sorted
    slot_ptr,  # (S,)
    gate_ptr,  # (S,) as the slots come
    scale_ptr,  # (D,) or None
    end_ptr,  # (N,)
    d_out_ptr,  # (S, D) sorted
    d_gate_ptr,  # (S,) as the slots come
    d_scale_ptr,  # (programs, D) to be added up; None without a scale
    num_slots,
    num_experts,
    top_k,
    width,  # D
    grad_stride_token,
    grad_stride_width,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The way back through y = gate * scale * out, for BLOCK_S slots of any experts."""
    row = (tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)).to(tl.int64)
    is_row = row < num_slots
    has_expert = row < tl.load(end_ptr + num_experts - 1)
    slot = tl.load(slot_ptr + row, mask=is_row, other=0)
    gate = tl.load(gate_ptr + slot, mask=has_expert, other=0.0).to(tl.float32)[:, None]
    grad_ptr += (slot // top_k)[:, None] * grad_stride_token
    d_gate = tl.zeros((BLOCK_S,), tl.float32)
    for start in range(0, width, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        is_column = column < width
        is_cell = has_expert[:, None] & is_column[None, :]
        cell = row[:, None] * width + column[None, :]
        grad = tl.load(grad_ptr + column[None, :] * grad_stride_width, mask=is_cell, other=0.0)
        grad = grad.to(tl.float32)
        out = tl.load(out_ptr + cell, mask=is_cell, other=0.0).to(tl.float32)
        if scale_ptr is not None:
            d_scale = tl.sum(grad * out * gate, 0)
            tl.store(d_scale_ptr + tl.program_id(0) * width + column, d_scale, mask=is_column)
            scale = tl.load(scale_ptr + column, mask=is_column, other=0.0).to(tl.float32)
            grad *= scale[None, :]
        d_gate += tl.sum(grad * out, 1)
        tl.store(d_out_ptr + cell, grad * gate, mask=is_row[:, None] & is_column[None, :])
    tl.store(d_gate_ptr + slot, d_gate, mask=is_row)


INTERPRETED = not isinstance(product_kernel, triton.JITFunction)
"""Whether Triton interprets the kernels, on tensors of any device, rather than compile them."""
