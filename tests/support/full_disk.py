"""A disk with no more space."""

import contextlib
import resource


@contextlib.contextmanager
def room_for(size):
    """No file grows over so many bytes, those of processes started in the block included."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
