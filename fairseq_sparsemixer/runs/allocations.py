"""Bounds what building a model may take, so that a small file cannot ask for a large model."""

import math
from typing import Any, Iterable, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_sparsemixer.runs.archives import TensorInFile, Untrusted

TIMES, SPARE_BYTES = 8, 256 << 20
"""A model takes at most so many times the bytes of its parameters in the file (which may be of
half precision, and tied), and so many for what is not in it: tables of positions."""
STEPS, SPARE_STEPS = 100, 10_000
"""It is made by at most so many operations for each of its tensors."""


class Allowance(NamedTuple):
    """What a model of a checkpoint may take: bytes, and operations."""

    bytes: int
    steps: int


def allowance(tensors: Iterable[Any]) -> Allowance:
    """That of a model whose state holds these, each record counted once."""
    held = [tensor for tensor in tensors if isinstance(tensor, TensorInFile)]
    records = {tensor.record: tensor.bytes_held for tensor in held}
    return Allowance(TIMES * sum(records.values()) + SPARE_BYTES, STEPS * len(held) + SPARE_STEPS)


class Bounded(TorchDispatchMode):
    """A context in which tensors are made up to an allowance.

    Raises:
        Untrusted: before it is exceeded.
    """

    def __init__(self, allowed: Allowance) -> None:
        super().__init__()
        self._bytes, self._steps = allowed

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation that the rest of the allowance covers."""
        self._bytes -= 8 * _elements(function, args)
        self._steps -= 1
        if self._bytes < 0 or self._steps < 0:
            raise Untrusted("asks for a model larger than the parameters that it holds")
        return function(*args, **(kwargs or {}))


def _elements(function: Any, args: Any) -> int:
    """How many elements an operation makes at most."""
    if any(result.alias_info is not None for result in function._schema.returns):
        return 0  # a view, or in place
    several = [list(arg) for arg in args if isinstance(arg, (list, tuple))]
    joined = sum(each.numel() for arg in several for each in arg if torch.is_tensor(each))
    shapes = [tuple(arg.shape) for arg in args if torch.is_tensor(arg)]
    if not shapes and not joined:  # from a shape, or a range
        sizes = [math.prod(arg) for arg in several]
        numbers = [abs(arg) for arg in args if isinstance(arg, (int, float))]
        return max(sizes or [math.ceil(max(numbers, default=0))])
    try:
        return joined + math.prod(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        return joined + max(map(math.prod, shapes))
