"""Freed memory that stays with the process, on Linux with glibc."""

import ctypes
import os
import sys

# Parameters of mallopt(3).
TRIM_THRESHOLD, MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next step instead of returning it to the system.

    A training step on the CPU frees all its activations. By default glibc returns blocks above 32 MiB, and
    the end of the heap, at once; the next step gets them back page by page, each cleared by the kernel. The
    resident size stays at the peak until the process ends. It holds for the whole process, so a library must
    not decide it: call it in a program of your own, before the first large tensor.

    Returns:
        False where glibc's allocator is not used, or the user has set it (``MALLOC_*_``, ``GLIBC_TUNABLES``),
        which is left as it is.
    """
    own = any(name.startswith("MALLOC_") and name.endswith("_") for name in os.environ)
    if own or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    return bool(mallopt(MMAP_MAX, 0)) and bool(mallopt(TRIM_THRESHOLD, -1))
