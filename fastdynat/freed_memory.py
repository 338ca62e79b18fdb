"""Freed memory that stays with the process, on Linux with glibc."""

import ctypes
import os
import sys
from pathlib import Path

# Parameters of mallopt(3).
TRIM_THRESHOLD, MMAP_MAX = -1, -4
TUNABLES = ("glibc.malloc.trim_threshold", "glibc.malloc.mmap_", "glibc.malloc.top_pad")
_kept = False
NVIDIA = Path("/dev/nvidiactl")  # there is an NVIDIA GPU


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next step instead of returning it to the system.

    A training step on the CPU frees all its activations. By default glibc returns blocks above 32 MiB, and
    the end of the heap, at once; the next step gets them back page by page, each cleared by the kernel. The
    resident size stays at the peak until the process ends, and the peak is higher by the holes between kept
    blocks (two fifths with ResNet-18 at batch 128). The setting applies to the whole process, so a library
    must not make it for its user: call this in a program of your own, before the first large tensor.

    Returns:
        False if the C library is not glibc, or if the user has configured when it returns memory
        (``MALLOC_*_``, ``GLIBC_TUNABLES``); that setting is left as it is.
    """
    own = any(name.startswith("MALLOC_") and name.endswith("_") for name in os.environ)
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if own or any(name in tunables for name in TUNABLES) or sys.platform != "linux":
        return False
    global _kept
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    _kept = bool(mallopt(MMAP_MAX, 0)) and bool(mallopt(TRIM_THRESHOLD, -1))
    return _kept


def keep_freed_memory_without_gpu() -> None:
    """`keep_freed_memory`, where networks on a GPU do not have an allocator of their own."""
    if not NVIDIA.exists():
        keep_freed_memory()


def freed_memory_is_kept() -> bool:
    """True after a successful `keep_freed_memory` in this process."""
    return _kept
