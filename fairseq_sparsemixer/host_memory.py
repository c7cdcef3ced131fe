"""Lets the C library keep memory that was released, where models are computed on a CPU.

torch's allocator for CPUs keeps nothing itself. glibc gives large blocks back to the system at
once, which zeroes them again page by page for the next update (docs/performance.md).
"""

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of glibc's malloc.h: how much may lie free at the end of the heap (-1: all), and how many blocks
may be taken from the system apart from the heap."""


def keep() -> bool:
    """Change this process's malloc, unless its user has (``MALLOC_*``, ``GLIBC_TUNABLES``).

    Returns:
        Whether it was changed; False without glibc, too.
    """
    of_user = any(name.startswith("MALLOC_") for name in os.environ)
    if of_user or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
