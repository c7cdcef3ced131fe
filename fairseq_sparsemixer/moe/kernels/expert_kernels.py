"""Triton kernels of :mod:`fairseq_sparsemixer.moe.kernels.products`.

Slots are sorted by expert, and the rows of each expert are cut into tiles
(:mod:`fairseq_sparsemixer.moe.kernels.sorting`). Slots without an expert are a last group, whose
results are zeros. Sums are formed in float32.

DESCRIBED matrices are given as tensor descriptors, by which a GPU's bulk copy engine (compute
capability 9.0 and above) fetches whole tiles, and else by pointers.
"""

# mypy: allow-untyped-defs
# Types of a kernel's arguments are made up by Triton for each call.

import triton
import triton.language as tl


@triton.jit
def product_kernel(
    a_ptr,  # (S, I) sorted, contiguous
    w_ptr,  # (N, O, I) contiguous; (N, I, O) if TRANSPOSED
    bias_ptr,  # (N, O) or None
    seed_ptr,  # (1,) of the dropout, or None
    active_ptr,  # (S, O) result of the ReLU and dropout to go back through, or None
    out_ptr,  # (S, O) sorted result, or None
    sums_ptr,  # (tiles, O) the sum of each tile of the result, or None
    placed_ptr,  # (S, O) result times gate and scale where the slots come from, or None
    slot_ptr,  # (S,) where they come from
    gate_ptr,  # (S,) as they come, or None
    scale_ptr,  # (O,) or None
    tile_ptr,  # (tiles, 3) the expert of each tile, its first row and one past its last
    num_experts,
    width,  # O
    depth,  # I
    kept_share,  # of the dropout
    scale_up,  # 1 / kept_share
    RELU: tl.constexpr,
    DESCRIBED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """a_s w_i^T + bias_i with the expert i of each slot s, and what follows it element by element.

    One program computes a tile of BLOCK_S slots by BLOCK_O columns.
    """
    tile, first_column = tl.program_id(1), tl.program_id(0) * BLOCK_O
    expert = tl.load(tile_ptr + 3 * tile)
    first = tl.load(tile_ptr + 3 * tile + 1)
    end = tl.load(tile_ptr + 3 * tile + 2)
    if expert > num_experts:
        return
    has_expert = expert < num_experts
    value = _product(
        a_ptr,
        w_ptr,
        expert.to(tl.int64),
        first.to(tl.int64),
        first_column,
        end,
        tl.where(has_expert, depth, 0),
        width,
        depth,
        DESCRIBED,
        TRANSPOSED,
        PRECISION,
        BLOCK_S,
        BLOCK_O,
        BLOCK_I,
    )
    # After the loop, for what is computed before it would hold registers throughout.
    row = tl.arange(0, BLOCK_S)  # of the tile
    column = first_column + tl.arange(0, BLOCK_O)
    is_row, is_column = first + row < end, column < width
    is_cell = is_row[:, None] & is_column[None, :]
    before = first.to(tl.int64) * width
    cell = row[:, None] * width + column[None, :]
    if bias_ptr is not None:
        bias = tl.load(
            bias_ptr + expert * width + column, mask=is_column & has_expert, other=0.0
        ).to(tl.float32)
        value += bias[None, :]
    if RELU:
        value = tl.where(value < 0, 0.0, value)  # leaves NaN, which tl.maximum would not
    if seed_ptr is not None:
        # One call draws four numbers, here those of four columns.
        four = tl.program_id(0) * (BLOCK_O // 4) + tl.arange(0, BLOCK_O // 4)
        draw = (first + row)[:, None] * tl.cdiv(width, 4) + four[None, :]
        u0, u1, u2, u3 = tl.rand4x(tl.load(seed_ptr), draw)
        uniform = tl.join(tl.join(u0, u2), tl.join(u1, u3)).reshape(BLOCK_S, BLOCK_O)
        kept = uniform < kept_share
        value = tl.where(kept, value * scale_up, 0.0)
    if active_ptr is not None:
        active = tl.load(active_ptr + before + cell, mask=is_cell, other=0.0)
        value = tl.where(active <= 0, 0.0, value * scale_up)
    if out_ptr is not None:
        tl.store(out_ptr + before + cell, value, mask=is_cell)
    if sums_ptr is not None:
        sums = tl.sum(tl.where(is_row[:, None], value, 0.0), 0)
        tl.store(sums_ptr + tile.to(tl.int64) * width + column, sums, mask=is_column)
    if placed_ptr is not None:
        slot = tl.load(slot_ptr + first + row, mask=is_row, other=0)
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + slot, mask=is_row & has_expert, other=0.0).to(tl.float32)
            value *= gate[:, None]
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + column, mask=is_column, other=0.0).to(tl.float32)
            value *= scale[None, :]
        tl.store(placed_ptr + slot[:, None] * width + column[None, :], value, mask=is_cell)


@triton.jit
def _product(
    a_ptr,
    w_ptr,
    expert,
    first,
    first_column,
    end,
    used_depth,
    width,
    depth,
    DESCRIBED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """(BLOCK_S, BLOCK_O): rows of a times columns of w^T. Rows from ``end`` mean nothing."""
    value = tl.zeros((BLOCK_S, BLOCK_O), tl.float32)
    if DESCRIBED:
        first_row, of_expert = first.to(tl.int32), expert.to(tl.int32)
        for start in range(0, used_depth, BLOCK_I):
            a = a_ptr.load([first_row, start])
            if TRANSPOSED:
                w = w_ptr.load([of_expert, start, first_column]).reshape(BLOCK_I, BLOCK_O)
            else:
                w = w_ptr.load([of_expert, first_column, start]).reshape(BLOCK_O, BLOCK_I).T
            value = tl.dot(a, w, value, input_precision=PRECISION)
    else:
        row = first + tl.arange(0, BLOCK_S)
        column = first_column + tl.arange(0, BLOCK_O)
        is_row, is_column = row < end, column < width
        a_ptr += row[:, None] * depth
        w_ptr += expert * width * depth
        if TRANSPOSED:
            w_ptr += column[None, :]
        else:
            w_ptr += column[None, :] * depth
        for start in range(0, used_depth, BLOCK_I):
            inner = start + tl.arange(0, BLOCK_I)
            is_inner = inner < depth
            a = tl.load(a_ptr + inner[None, :], mask=is_row[:, None] & is_inner[None, :], other=0.0)
            inner_of_w = inner * width if TRANSPOSED else inner
            w = tl.load(
                w_ptr + inner_of_w[:, None], mask=is_inner[:, None] & is_column[None, :], other=0.0
            )
            value = tl.dot(a, w, value, input_precision=PRECISION)
    return value


@triton.jit
def weight_gradient_kernel(
    grad_ptr,  # (S, O) sorted, contiguous
    a_ptr,  # (S, I) sorted, contiguous
    grad_descriptor,  # of the same where DESCRIBED
    a_descriptor,
    d_w_ptr,  # (N, O, I)
    end_ptr,  # (N,)
    width,  # O
    depth,  # I
    DESCRIBED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """grad^T a over the slots of each expert.

    One program computes BLOCK_O by BLOCK_I weights of one expert from all of its slots.
    """
    expert = tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(depth, BLOCK_I)
    first_column = tl.program_id(0) // tiles * BLOCK_O
    first_inner = tl.program_id(0) % tiles * BLOCK_I
    first = tl.load(end_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(end_ptr + expert)

    d_w = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    if DESCRIBED:
        whole = first + (end - first) // BLOCK_S * BLOCK_S
        for start in range(first, whole, BLOCK_S):
            grad = grad_descriptor.load([start, first_column])
            a = a_descriptor.load([start, first_inner])
            d_w = tl.dot(grad.T, a, d_w, input_precision=PRECISION)
        if whole < end:  # rows of the next expert would be fetched too
            grad = _rows(grad_ptr, whole, end, first_column, width, BLOCK_S, BLOCK_O)
            a = _rows(a_ptr, whole, end, first_inner, depth, BLOCK_S, BLOCK_I)
            d_w = tl.dot(grad.T, a, d_w, input_precision=PRECISION)
    else:
        for start in range(first, end, BLOCK_S):
            grad = _rows(grad_ptr, start, end, first_column, width, BLOCK_S, BLOCK_O)
            a = _rows(a_ptr, start, end, first_inner, depth, BLOCK_S, BLOCK_I)
            d_w = tl.dot(grad.T, a, d_w, input_precision=PRECISION)

    column = first_column + tl.arange(0, BLOCK_O)
    inner = first_inner + tl.arange(0, BLOCK_I)
    tl.store(
        d_w_ptr + (expert * width + column[:, None]) * depth + inner[None, :],
        d_w,
        mask=(column < width)[:, None] & (inner < depth)[None, :],
    )


@triton.jit
def _rows(ptr, start, end, first_column, width, BLOCK_S: tl.constexpr, BLOCK_X: tl.constexpr):
    """(BLOCK_S, BLOCK_X) of a matrix from a row and a column on, 0 from row ``end``."""
    row = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
    column = first_column + tl.arange(0, BLOCK_X)
    return tl.load(
        ptr + row[:, None] * width + column[None, :],
        mask=(row < end)[:, None] & (column < width)[None, :],
        other=0.0,
    )


@triton.jit
def sum_groups_kernel(
    value_ptr,  # (R, X)
    end_ptr,  # (N,)
    sum_ptr,  # (N, X)
    width,  # X
    BLOCK_R: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """BLOCK_X columns of the sum of one group's rows."""
    group = tl.program_id(1).to(tl.int64)
    first_column = tl.program_id(0) * BLOCK_X
    first = tl.load(end_ptr + group - 1, mask=group > 0, other=0)
    end = tl.load(end_ptr + group)
    total = tl.zeros((BLOCK_R, BLOCK_X), tl.float32)
    for start in range(first, end, BLOCK_R):
        total += _rows(value_ptr, start, end, first_column, width, BLOCK_R, BLOCK_X).to(tl.float32)
    column = first_column + tl.arange(0, BLOCK_X)
    tl.store(sum_ptr + group * width + column, tl.sum(total, 0), mask=column < width)


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
