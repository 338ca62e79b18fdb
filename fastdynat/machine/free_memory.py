"""Checks of available memory before an allocation that a flag, a file or a name asks for."""

import os
import resource
from pathlib import Path

from fastdynat.errors import UserError
from fastdynat.launch import local_size

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int | None:
    """Return the bytes that this process can still allocate, container and shell limits included; None where
    unknown.
    """
    amounts = (_system_available(), _cgroup_available(), _limit_available())
    return min((amount for amount in amounts if amount is not None), default=None)


def own_memory() -> int | None:
    """Return `available_memory` divided among the processes that the launcher started on this machine."""
    available = available_memory()
    return None if available is None else available // local_size()


def check_room(needed: int, what: str, *, available: int | None = None) -> None:
    """Raise UserError where `needed` bytes are more than there are; `what` they are for stands in front, with
    its verb.

    available: free bytes, of another device; None is `available_memory`.
    """
    available = available_memory() if available is None else available
    if available is not None and needed > available:
        gib = 1 << 30
        raise UserError(f"{what} {needed / gib:,.1f} GiB of memory, and {available / gib:,.1f} GiB are free")


def _limit_available() -> int | None:
    """Bytes left under the limit of `ulimit -v`; None without a limit."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (OSError, ValueError):
        return None
    return max(limit - pages * os.sysconf("SC_PAGE_SIZE"), 0)


def _system_available() -> int | None:
    try:
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return None
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _cgroup_available() -> int | None:
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        # The page cache counts as used but is given back on demand.
        for line in (CGROUP / "memory.stat").read_text().splitlines():
            if line.startswith("inactive_file "):
                used -= int(line.split()[1])
        return None if limit == "max" else max(int(limit) - used, 0)
    except (OSError, ValueError):
        return None
