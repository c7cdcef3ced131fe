"""A disk without room: found out, said, and never taken for another error."""

import contextlib
import errno
import os
import tempfile
from pathlib import Path
from typing import Iterator, Optional

from fairseq_sparsemixer.errors import UserError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The last is that of a limit on the size of a file."""


class FullDiskError(UserError):
    """A file does not fit on its disk; what it would have replaced is still there."""


def full_disk(error: BaseException) -> Optional[OSError]:
    """The error that says that a disk is full, among ``error`` and what it came from, else None.

    ``torch.save`` and others go on after a write that failed, and stumble over something else.
    """
    cause: Optional[BaseException] = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in NO_SPACE:
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def full_disk_in(text: str) -> Optional[OSError]:
    """The error of a disk that is full, where a program's messages tell of one, else None."""
    for number in NO_SPACE:
        if os.strerror(number) in text:
            return OSError(number, os.strerror(number))
    return None


def check_room(folder: Path) -> None:
    """Find out whether a few lines of text fit into a folder.

    Raises:
        FullDiskError: they do not.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(1 << 16))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        if full_disk(error) is None:
            raise
        raise FullDiskError(cannot_write(error, folder)) from error


def cannot_write(reason: OSError, path: Optional[Path] = None) -> str:
    """The message for a disk that is full."""
    what = path or reason.filename or "the output"
    return (
        f"cannot write {what} ({reason.strerror}): make room there, or choose another place, and "
        "run the same command again"
    )


@contextlib.contextmanager
def report_full_disk(folder: Path, megabytes: int, flag: str = "--output") -> Iterator[None]:
    """Turn "no space left" inside the block into a :class:`UserError` that names ``folder``."""
    try:
        yield
    except Exception as error:
        told = isinstance(error, UserError) and not isinstance(error, FullDiskError)
        if told or full_disk(error) is None:
            raise
        raise UserError(
            f"no space left on the disk of {folder} (about {megabytes} MB are needed): make room, "
            f"or choose another folder with {flag}, and run the same command again"
        ) from error
