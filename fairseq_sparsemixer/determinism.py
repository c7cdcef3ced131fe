"""``--deterministic``: training by operators alone that give the same bits each time.

On a CPU training does so without it. On a GPU sums whose order is left to chance do not: those of
attention's gradient and of PyTorch's ``index_add``. Our kernels have no such sums.
"""

import functools
import os
from typing import Any, Callable

import torch

from fairseq_sparsemixer.errors import UserError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def switch(on: bool) -> None:
    """Let PyTorch take, or no longer take, the deterministic form of each operator.

    It refuses an operator that has none. cuBLAS reads its environment when it is first used.
    """
    if on:
        os.environ.setdefault(WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(on)
    # It would also write NaN into new memory, to show what reads it too early: that costs time.
    torch.utils.deterministic.fill_uninitialized_memory = not on  # type: ignore[attr-defined]


_switched = False
"""Whether the training before switched it on."""


def follow(wanted: bool) -> None:
    """Switch it on for a training that wants it, and off again for the next one in this process.

    hydra's sweeps train several. Who has asked PyTorch for it keeps it.
    """
    global _switched
    if wanted and not torch.are_deterministic_algorithms_enabled():
        switch(True)
        _switched = True
    elif _switched and not wanted:
        switch(False)
        _switched = False


def naming_the_flag(step: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a step of training: an operator that is refused is told in one sentence."""

    @functools.wraps(step)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return step(*args, **kwargs)
        except RuntimeError as error:
            name, found, _ = str(error).partition(" does not have a deterministic implementation")
            if not found:
                raise
            raise UserError(
                f"--deterministic: PyTorch has no deterministic form of {name}: train without it"
            ) from error

    return wrapped
