"""Two commands in one place: the second waits, or says who is at work.

The locks are the system's (flock): those of a process that was killed are gone with it.
"""

import contextlib
import fcntl
import os
import platform
import sys
from pathlib import Path
from typing import Iterator, List, Optional, Set

from fairseq_sparsemixer.disk import full_disk
from fairseq_sparsemixer.errors import UserError

_NOT_INHERITED: Set[int] = set()
"""Locks, as file descriptors, that end with this process though it has forked."""


@contextlib.contextmanager
def in_turn(place: Path, *, beside: bool = False) -> Iterator[None]:
    """Work in a folder, or on what has its name, once whoever does so already has ended.

    A process that was killed holds nobody up.

    Args:
        place: a folder; or, with ``beside``, what is or will be in its parent: a file, or the stem
            of several.

    Raises:
        UserError: the place cannot be written to.
    """
    lock = place.with_name(f".{place.name}.lock") if beside else place / ".lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {lock.parent} ({error.strerror})") from error
    with locked(lock, place) as descriptor:
        _sign(descriptor)
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):
                lock.unlink()


@contextlib.contextmanager
def sole_user(
    folder: Path, flag: str, *, name: str = ".lock", heirs: bool = True
) -> Iterator[List[int]]:
    """Keep others out of a folder for as long as this process or its heir lives.

    Args:
        folder: that is written to.
        flag: that names it.
        name: of the file there that is locked.
        heirs: whether processes that it forks inherit the lock.

    Yields:
        The file descriptors to hand to the heir (``keep_open``): a training process that outlives
        this one, because this one was killed, still keeps others out.

    Raises:
        UserError: another process is in it, or it cannot be written to.
    """
    with locked(folder / name, folder, flag, heirs=heirs) as descriptor:
        _sign(descriptor, " or what it started" if heirs else "")
        try:
            yield [descriptor]
        finally:
            # Not the file itself: an heir may still be at work.
            os.ftruncate(descriptor, 0)


@contextlib.contextmanager
def locked(
    lock: Path, place: Path, flag: Optional[str] = None, *, heirs: bool = False
) -> Iterator[int]:
    """Lock a file, which is made; its descriptor.

    Args:
        lock: the file.
        place: what it stands for, in messages.
        flag: that names the place: who comes second is refused; without it, that one waits.
        heirs: whether processes that this one forks inherit the lock.

    Raises:
        UserError: see :func:`sole_user`.
    """
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            if full_disk(error):
                raise
            cure = f"; choose another place with {flag}" if flag else ""
            raise UserError(f"cannot write into {lock.parent} ({error.strerror}){cure}") from error
        if not heirs:
            _NOT_INHERITED.add(descriptor)
        try:
            _wait_for(descriptor, lock, place, flag)
            # Whoever had it may have removed or moved the file.
            if lock.exists() and os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                yield descriptor
                return
        finally:
            _NOT_INHERITED.discard(descriptor)
            os.close(descriptor)


def remove_if_free(lock: Path) -> None:
    """Remove a file that :func:`locked` made, unless someone has it still."""
    with contextlib.suppress(FileNotFoundError, PermissionError), lock.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:
            pass  # a file system without locks
        if os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):  # not another's by now
            lock.unlink()


def _wait_for(descriptor: int, lock: Path, place: Path, flag: Optional[str]) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = _signature(lock) or "another process"
        if flag is not None:
            raise UserError(
                f"{who} is at work in {place}: wait for it or end it, or name another folder with "
                f"{flag}"
            ) from None
        print(f"waiting for {who}, which is at work on {place}", file=sys.stderr, flush=True)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        pass  # a file system without locks


def _sign(descriptor: int, more: str = "") -> None:
    """Write into a file that was locked by whom."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:2]]
    text = f"process {os.getpid()} on {platform.node()} ({' '.join(words)}){more}"
    with contextlib.suppress(OSError):  # no room for it
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(errors="replace"), 0)


def _signature(lock: Path) -> str:
    """What :func:`_sign` wrote; empty where it did not."""
    if not lock.name.endswith(".lock"):
        return ""
    try:
        return lock.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _end_locks() -> None:
    """In a forked child, whose copies would outlive this process."""
    for descriptor in _NOT_INHERITED:
        os.close(descriptor)
    _NOT_INHERITED.clear()


os.register_at_fork(after_in_child=_end_locks)
