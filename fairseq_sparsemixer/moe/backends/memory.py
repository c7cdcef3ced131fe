"""Memory for large gradients on a CPU.

The gradients of all experts of a layer are new memory in each update: 67 MB for eight experts of
512 x 2048, 16,000 pages that the system clears and hands over one by one, which takes longer than
the product that fills them. What an update has released is therefore used again by the next, as
torch's allocator does on GPUs.
"""

import collections
import ctypes
import sys
import weakref
from typing import Any, Deque, List, Optional, Set

import torch
from torch import Tensor

HUGE_PAGE = 2**21
"""Bytes."""
MADV_HUGEPAGE = 14
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_use_count: Any = getattr(torch._C, "_storage_Use_Count", None)


class Recycler:
    """Hands out memory, and hands it out again once nothing else refers to it.

    It keeps at most what was in use at one time. Memory that fits no more request is given back
    when new memory is needed, and all of it when an owner is gone.
    """

    def __init__(self) -> None:
        self._blocks: Deque[torch.UntypedStorage] = collections.deque()
        self._owners: Set[int] = set()

    def serve(self, owner: object) -> None:
        """Note whose memory this is: kept for the next update of a model, not beyond its life."""
        if id(owner) not in self._owners:
            self._owners.add(id(owner))
            weakref.finalize(owner, self._leave, id(owner)).atexit = False

    def _leave(self, owner: int) -> None:
        self._owners.discard(owner)
        self._blocks.clear()  # what others use stays theirs, and is merely not handed out again

    def empty_like(self, value: Tensor) -> Tensor:
        """Uninitialised and contiguous, of the shape, dtype and device of ``value``."""
        if value.device.type != "cpu" or value.nbytes < HUGE_PAGE or _use_count is None:
            return torch.empty_like(value, memory_format=torch.contiguous_format)
        block = self._released(value.nbytes)
        if block is None:
            block = on_huge_pages(torch.empty(value.nbytes, dtype=torch.uint8)).untyped_storage()
        fresh = torch.empty(0, dtype=value.dtype).set_(block).resize_(value.shape)
        self._blocks.append(block)
        return fresh

    def _released(self, nbytes: int) -> Optional[torch.UntypedStorage]:
        """A block of that size that nobody uses; all unused blocks are dropped if there is none."""
        unused: List[torch.UntypedStorage] = []
        for _ in range(len(self._blocks)):
            try:
                # Atomic: no two threads get the same block. Others may have taken the rest.
                block = self._blocks.popleft()
            except IndexError:
                break
            if block.is_shared():
                continue  # other processes may use it, and are not counted
            if _use_count(block._cdata) > 1 or sys.getrefcount(block) > 2:
                self._blocks.append(block)
            elif block.nbytes() == nbytes:
                self._blocks.extend(unused)
                return block
            else:
                unused.append(block)
        return None


GRADIENTS = Recycler()
"""The gradients of all layers: those of one micro-batch that were added to others serve again."""


def on_huge_pages(value: Tensor) -> Tensor:
    """``value``, its memory on huge pages where Linux has them; to be called before it is used."""
    if _libc is not None:
        start = value.data_ptr()
        first = -(-start // HUGE_PAGE) * HUGE_PAGE
        last = (start + value.nbytes) // HUGE_PAGE * HUGE_PAGE
        if last > first:
            # Advice: where the kernel has no huge pages it says so, and nothing changes.
            _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_HUGEPAGE)
    return value
