"""The tensors of a checkpoint, in place of what stands for them in its pickle.

torch's own reader would read the archive and the pickle once more, in ways of its own: a file can
be made that says one thing to Python's and another to torch's. Here what was checked is what is
used.
"""

import argparse
import sys
import zipfile
from typing import Any, BinaryIO, Dict, List, Tuple

import torch

from fairseq_sparsemixer.runs.archives import (
    CHUNK,
    Damaged,
    NumpyArray,
    Refusal,
    TensorInFile,
    reason,
)

DEEPEST = 100
"""Of lists in lists."""
TIMES, SPARE_BYTES = 8, 256 << 20
"""What all tensors may claim beyond what the file holds: they share storages, and may be many."""


def fill(file: BinaryIO, contents: Any) -> Any:
    """``contents`` with tensors, and numpy's arrays as lists; mappings and lists are changed.

    Args:
        file: the checkpoint, open.
        contents: what :func:`.archives.contents` found in it.

    Raises:
        Refusal: it is damaged, or asks for more memory than it has a right to.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return _Filling(archive).filled(contents, 0)
    except (Refusal, OSError):
        raise
    except Exception as error:  # zipfile, zlib, torch: each has its own
        raise Damaged(f"is damaged ({reason(error)})") from error


class _Filling:
    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        names = archive.namelist()
        self._folder = names[0].partition("/")[0]
        order = f"{self._folder}/byteorder"
        if order in names and archive.read(order) != sys.byteorder.encode():
            raise Refusal("was written on a machine with another order of bytes")
        self._storages: Dict[str, torch.Tensor] = {}
        self._claimed = self._held = 0
        self._done: Dict[int, Tuple[Any, Any]] = {}

    def filled(self, value: Any, depth: int) -> Any:
        """``value``, or what takes its place."""
        if isinstance(value, TensorInFile):
            return self._tensor(value)
        if isinstance(value, NumpyArray):
            return value.values
        if type(value) is not tuple and not isinstance(value, (dict, list, argparse.Namespace)):
            return value
        if id(value) in self._done:
            return self._done[id(value)][1]
        if depth > DEEPEST:
            raise Refusal("holds lists in lists deeper than any that fairseq writes")
        self._done[id(value)] = value, value  # what holds itself ends here
        if isinstance(value, tuple):
            new = tuple(self.filled(each, depth + 1) for each in value)
            self._done[id(value)] = value, new
            return new
        inner = vars(value) if isinstance(value, argparse.Namespace) else value
        places: List[Any] = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        for place in places:
            inner[place] = self.filled(inner[place], depth + 1)
        return value

    def _tensor(self, wanted: TensorInFile) -> torch.Tensor:
        if wanted.record not in self._storages:
            self._storages[wanted.record] = self._storage(wanted)
            self._held += wanted.bytes_held
        self._claimed += wanted.bytes_claimed
        if self._claimed > TIMES * self._held + SPARE_BYTES:
            raise Refusal("holds the same parameters more often than any that fairseq writes")
        dtype = getattr(torch, wanted.storage.kind.dtype)
        storage = self._storages[wanted.record].untyped_storage()
        empty = torch.empty(0, dtype=dtype)
        return empty.set_(storage, wanted.offset, wanted.shape, wanted.stride)  # type: ignore

    def _storage(self, wanted: TensorInFile) -> torch.Tensor:
        storage = torch.empty(wanted.bytes_held, dtype=torch.uint8)
        room = memoryview(storage.numpy())  # type: ignore[arg-type]
        with self._archive.open(f"{self._folder}/{wanted.record}") as stream:
            while chunk := stream.read(CHUNK):
                room[: len(chunk)] = chunk
                room = room[len(chunk) :]
        if room:
            raise Damaged(f"is damaged: {wanted.record} is shorter than it was")
        return storage
