"""Checkpoints that a killed run left."""

import os

import pytest
import torch
from support import commands

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import atomic_path
from fairseq_sparsemixer.runs import mending as checkpoints


def test_the_newest_whole_checkpoint_takes_the_place_of_a_damaged_one(tmp_path):
    assert checkpoints.mend_last(tmp_path) is None
    for age, name in enumerate(["checkpoint_1_4.pt", "checkpoint_1_2.pt", "checkpoint_average.pt"]):
        torch.save({"name": name}, tmp_path / name)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    (tmp_path / "checkpoint_1_6.pt").write_bytes((tmp_path / "checkpoint_1_4.pt").read_bytes()[:99])
    last = tmp_path / "checkpoint_last.pt"
    last.write_bytes(b"")
    assert checkpoints.mend_last(tmp_path).name == "checkpoint_1_4.pt"
    assert commands.load(last) == {"name": "checkpoint_1_4.pt"}
    # What another process writes now is its own; what a killed one left is nobody's.
    left_over = tmp_path / ".checkpoint_1_2.pt.partial"
    left_over.touch()
    with atomic_path(tmp_path / "checkpoint_mine.pt") as partial:
        partial.write_bytes(b"half")
        assert checkpoints.mend_last(tmp_path) is None
        assert partial.read_bytes() == b"half" and not left_over.exists()
    assert (tmp_path / "checkpoint_mine.pt").read_bytes() == b"half"
    data = bytearray(last.read_bytes())
    data[data.index(b"checkpoint_1_4")] ^= 1  # one bit
    last.write_bytes(data)
    assert checkpoints.mend_last(tmp_path).name == "checkpoint_1_4.pt"
    for path in tmp_path.glob("checkpoint*.pt"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"checkpoint_last\.pt is damaged, and so is every other"):
        checkpoints.mend_last(tmp_path)
