"""Slots sorted by counting against PyTorch's own sort."""

import pytest
import torch

from fairseq_sparsemixer.moe.kernels import sorting

pytestmark = pytest.mark.skipif(
    sorting.triton is None or torch.cuda.is_available(),
    reason="needs Triton, and is for its interpreter",
)


@pytest.mark.parametrize(
    ("slots", "experts", "tile"),
    [(300, 5, 16), (1000, 70, 32), (0, 3, 16), (513, 1, 128), (256, 40, 16)],
)
@pytest.mark.parametrize("kind", ["mixed", "one expert", "none"])
def test_slots_lie_as_a_stable_sort_lays_them(slots, experts, tile, kind):
    torch.manual_seed(0)
    expert = torch.randint(-1, experts, (slots, 2))[:, 0]  # not contiguous
    if kind != "mixed":
        expert.fill_(experts - 1 if kind == "one expert" else -1)
    slot, end, tile_end, tiles = sorting.sort_slots(expert, experts, tile)

    groups, expected = torch.where(expert < 0, experts, expert).sort(stable=True)
    assert torch.equal(slot, expected)
    assert end.tolist() == [int((groups <= group).sum()) for group in range(experts + 1)]
    rows, first = [], 0
    for group, last in enumerate(end.tolist()):
        rows += [[group, row, min(row + tile, last)] for row in range(first, last, tile)]
        assert tile_end[group] == len(rows)
        first = last
    assert tiles[: len(rows)].tolist() == rows
    assert len(rows) <= len(tiles)
    assert (tiles[len(rows) :, 0] == experts + 1).all()
