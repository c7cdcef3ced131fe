"""The slots of a batch in the order of their experts, by counting, and cut into tiles.

Nothing waits for the device: shapes do not depend on the routing. There are always S slots; those
without an expert, which padding and empty slots have, come last.
"""

from typing import Tuple

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.kernels.operators import cdiv, operator

try:
    import triton

    from fairseq_sparsemixer.moe.kernels import sorting_kernels as kernels
except ImportError:
    triton = None

BLOCK_S = 256
"""Slots that one program counts and places."""
BLOCK_N = 32
"""Experts that it looks at together."""


def most_tiles(num_slots: int, num_experts: int, tile: int) -> int:
    """How many tiles there are at most, however the slots are shared out.

    No group but each expert's and that of no expert has a broken one.
    """
    return cdiv(num_slots, tile) + num_experts


def _sort_slots_like(
    expert: Tensor, num_experts: int, tile: int
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    num_slots = expert.numel()
    end = expert.new_empty(num_experts + 1, dtype=torch.int32)
    tiles = end.new_empty(most_tiles(num_slots, num_experts, tile), 3)
    return expert.new_empty(num_slots), end, torch.empty_like(end), tiles


@operator(_sort_slots_like)
def sort_slots(
    expert: Tensor, num_experts: int, tile: int
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where slots go when those of one expert lie together, in the order that they come in.

    Args:
        expert: S of int64, the expert of each slot, -1 for none.
        num_experts: N.
        tile: rows of a tile, which has slots of one expert only.

    Returns:
        (S,) int64, which slot lies in each place; (N + 1,) int32, one past the last place of each
        expert and of no expert; (N + 1,) int32, one past the last tile of each; (tiles, 3) int32,
        the expert of each tile, N for none, its first place and one past its last. Tiles that
        there are not, at the end, have expert N + 1.
    """
    slot, end, tile_end, tiles = _sort_slots_like(expert, num_experts, tile)
    expert, num_slots = expert.contiguous(), expert.numel()
    programs = max(1, cdiv(num_slots, BLOCK_S))
    count = end.new_empty(programs, num_experts + 1)
    kernels.count_kernel[(programs,)](
        *(expert, count, num_slots, num_experts + 1), BLOCK_S=BLOCK_S, BLOCK_N=BLOCK_N
    )
    kernels.place_kernel[(programs,)](
        *(expert, count, slot, end, tile_end, tiles),
        *(num_slots, num_experts + 1, programs, tiles.shape[0]),
        TILE=tile,
        BLOCK_S=BLOCK_S,
        BLOCK_N=BLOCK_N,
        BLOCK_P=32,
        num_warps=8,
    )
    return slot, end, tile_end, tiles
