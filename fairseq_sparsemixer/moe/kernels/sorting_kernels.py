"""Triton kernels of :mod:`fairseq_sparsemixer.moe.kernels.sorting`."""

# mypy: allow-untyped-defs
# Types of a kernel's arguments are made up by Triton for each call.

import triton
import triton.language as tl


@triton.jit
def _one_hot(group_ptr, row, num_slots, num_groups, column):
    """(rows, columns) int32: whether a slot is of a group; slots without an expert are the last."""
    group = tl.load(group_ptr + row, mask=row < num_slots, other=num_groups)
    group = tl.where(group < 0, num_groups - 1, group)
    return (group[:, None] == column[None, :]).to(tl.int32)


@triton.jit(do_not_specialize=["num_slots"])
def count_kernel(
    group_ptr,  # (S,) the expert of each slot, -1 for none
    count_ptr,  # (programs, N + 1)
    num_slots,
    num_groups,  # N + 1
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """How many of BLOCK_S slots each expert has, and how many have none."""
    row = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    for first in range(0, num_groups, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        count = tl.sum(_one_hot(group_ptr, row, num_slots, num_groups, column), 0)
        place = count_ptr + tl.program_id(0) * num_groups + column
        tl.store(place, count, mask=column < num_groups)


@triton.jit(do_not_specialize=["num_slots", "programs", "most_tiles"])
def place_kernel(
    group_ptr,  # (S,) the expert of each slot, -1 for none
    count_ptr,  # (programs, N + 1)
    slot_ptr,  # (S,)
    end_ptr,  # (N + 1,)
    tile_end_ptr,  # (N + 1,)
    tile_ptr,  # (tiles, 3) the group of each tile, its first row and one past its last
    num_slots,
    num_groups,  # N + 1
    programs,
    most_tiles,
    TILE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Write BLOCK_S slots where they belong, and a share of the table of tiles of TILE rows."""
    program = tl.program_id(0)
    row = program * BLOCK_S + tl.arange(0, BLOCK_S)
    place = tl.zeros((BLOCK_S,), tl.int32)
    end_before = 0
    tiles_before = 0
    for first in range(0, num_groups, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        is_column = column < num_groups
        total = tl.zeros((BLOCK_N,), tl.int32)
        before = tl.zeros((BLOCK_N,), tl.int32)
        for start in range(0, programs, BLOCK_P):
            other = start + tl.arange(0, BLOCK_P)
            count = tl.load(
                count_ptr + other[:, None] * num_groups + column[None, :],
                mask=(other < programs)[:, None] & is_column[None, :],
                other=0,
            )
            total += tl.sum(count, 0)
            before += tl.sum(tl.where((other < program)[:, None], count, 0), 0)
        start_of = end_before + tl.cumsum(total, 0) - total
        one_hot = _one_hot(group_ptr, row, num_slots, num_groups, column)
        rank = start_of[None, :] + before[None, :] + tl.cumsum(one_hot, 0) - one_hot
        place += tl.sum(rank * one_hot, 1)
        end_before += tl.sum(total, 0)

        tiles = (total + TILE - 1) // TILE
        first_tile = tiles_before + tl.cumsum(tiles, 0) - tiles
        if program == 0:
            tl.store(end_ptr + column, start_of + total, mask=is_column)
            tl.store(tile_end_ptr + column, first_tile + tiles, mask=is_column)
        for tile in range(program, tl.max(tiles, 0), programs):
            entry = tile_ptr + 3 * (first_tile + tile)
            first_row = start_of + tile * TILE
            tl.store(entry, column, mask=tile < tiles)
            tl.store(entry + 1, first_row, mask=tile < tiles)
            tl.store(entry + 2, tl.minimum(first_row + TILE, start_of + total), mask=tile < tiles)
        tiles_before += tl.sum(tiles, 0)
    for tile in range(tiles_before + program, most_tiles, programs):
        tl.store(tile_ptr + 3 * tile, num_groups)
    tl.store(slot_ptr + place, row.to(tl.int64), mask=row < num_slots)
