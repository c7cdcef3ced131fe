"""Another process at work somewhere."""

import contextlib
import fcntl
import os
import signal
from unittest import mock


@contextlib.contextmanager
def busy(place, *, killed=False):
    """Another process that is inside of the context manager that ``place`` makes.

    It leaves as soon as this process waits for a lock, and at the end of the block.

    Args:
        place: called there, for the context.
        killed: whether it is killed then, in place of leaving.

    Yields:
        Its number.
    """
    (told, tell), (awaited, leave) = os.pipe(), os.pipe()
    process = os.fork()
    if not process:
        status = 1
        try:
            os.close(leave)
            with place():
                os.write(tell, b"inside")
                os.read(awaited, 1)  # until the other end is closed
            status = 0
        finally:
            os._exit(status)
    ends = contextlib.ExitStack()
    ends.callback(os.close, leave)
    if killed:
        ends.callback(os.kill, process, signal.SIGKILL)
    lock = fcntl.flock

    def flock(descriptor, operation):
        if not operation & fcntl.LOCK_NB:
            ends.close()
        lock(descriptor, operation)

    os.close(tell)
    try:
        assert os.read(told, 6) == b"inside"
        with mock.patch.object(fcntl, "flock", flock):
            yield process
    finally:
        ends.close()
        _, status = os.waitpid(process, 0)
        for descriptor in (told, awaited):
            os.close(descriptor)
    assert os.waitstatus_to_exitcode(status) == (-signal.SIGKILL if killed else 0)
