"""What does not work with this package, or is not installed, is told in one sentence."""

import importlib
import importlib.metadata
import platform
from typing import Any, Optional, Tuple

from fairseq_sparsemixer.errors import UserError, end_with_one_line
from fairseq_sparsemixer.version import FAIRSEQ, MINIMUM_PYTHON, MINIMUM_TORCH, TOO_NEW_PYTHON


def check() -> None:
    """Python, and PyTorch if it is installed, without importing it.

    Raises:
        UserError: of a version that does not work.
    """
    python, torch = platform.python_version(), version_of("torch")
    if not _numbers(MINIMUM_PYTHON) <= _numbers(python) < _numbers(TOO_NEW_PYTHON):
        _refuse(
            f"Python {python} is not supported: use {MINIMUM_PYTHON} or a later one before "
            f"{TOO_NEW_PYTHON}"
        )
    if torch is not None and _numbers(torch) < _numbers(MINIMUM_TORCH):
        _refuse(f"torch {torch} is too old: pip install 'torch>={MINIMUM_TORCH}'")


def check_fairseq() -> None:
    """The fairseq that is about to be imported; one without a version is of the user's own making.

    Raises:
        UserError: it is older than what was tried.
    """
    found = version_of("fairseq")
    if found is None or version_of("ve-fairseq") is not None:
        return
    if _numbers(found, 3) < _numbers(FAIRSEQ, 3):
        _refuse(
            f"fairseq {found} is too old: pip uninstall fairseq, then pip install "
            f"ve-fairseq=={FAIRSEQ}"
        )


def load(module: str, extra: str) -> Any:
    """A module that only what an extra of this package installs has.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"this needs {error.name}: run `pip install 'fairseq-sparsemixer[{extra}]'`"
        ) from error


def version_of(distribution: str) -> Optional[str]:
    """That which is installed, if any."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str, parts: int = 2) -> Tuple[int, ...]:
    """The first numbers of a version such as 2.7.0a0+git1234."""
    numbers = []
    for part in version.split(".")[:parts]:
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        numbers.append(int(digits or 0))
    return tuple(numbers)


def _refuse(message: str) -> None:
    """End with it, though nothing else of this package is there yet."""
    end_with_one_line()
    raise UserError(message)
