"""Mark files that identify candidates whose check ended the process.

A signal of a crash (SIGSEGV, SIGABRT, SIGBUS, SIGILL, SIGFPE) is written into the mark while the process
dies, and counts at once. Any other end, such as kill -9, SIGTERM, a lack of memory or a power cut, says
little about the candidate: it is checked once more, and counts if the process ends at the same case again.
"""

import faulthandler
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from fastdynat.verification.verdict_store import path_of

Note = Callable[[str], None]
CRASHED = "Fatal Python error: "  # what faulthandler writes in the signal's handler
LENGTH = 4000  # bytes of a mark that are read


@dataclass(frozen=True)
class Left:
    """The mark of earlier processes: the case at which they ended, how often, and the crash, if any."""

    case: str = ""
    ends: int = 0
    crash: str = ""

    def __str__(self) -> str:
        """The reason not to try the candidate again; empty if there is none."""
        if self.crash:
            return f"the process that checked it crashed there ({self.crash})"
        return "two processes that checked it ended there" if self.ends > 1 else ""


@contextmanager
def mark(key: Mapping[str, Any], candidate: str) -> Iterator[tuple[Left, Note]]:
    """Keep a mark file while `candidate` is checked; it remains if the check ends this process.

    Yields the mark of earlier processes, and a function that notes the next case in this process's mark. A
    mark that another process still holds is ignored."""
    handle = _locked(key, candidate)
    if handle is None:
        yield Left(), _write_nothing
        return
    left = _read(handle)

    def note(case: str) -> None:
        ends = left.ends if case == left.case else 0
        with suppress(OSError):
            os.truncate(handle, os.pwrite(handle, f"{case}\n{ends}\n".encode()[:LENGTH], 0))
            os.lseek(handle, 0, os.SEEK_END)  # where faulthandler writes

    # A caller that has enabled it already wants its output elsewhere.
    ours = not faulthandler.is_enabled()
    try:
        if ours:
            faulthandler.enable(handle, all_threads=False)
        yield left, note
    finally:
        if ours:
            faulthandler.disable()
        with suppress(OSError):
            _path(key, candidate).unlink()
        os.close(handle)


def _path(key: Mapping[str, Any], candidate: str) -> Any:
    path = path_of(key)
    return None if path is None else path.with_name(f"{path.stem}-{candidate}.checking")


def _locked(key: Mapping[str, Any], candidate: str) -> int | None:
    """The open and locked mark file; None if it cannot be locked."""
    path = _path(key, candidate)
    if path is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another process checks the same right now
        os.close(handle)
        return None
    return handle


def _read(handle: int) -> Left:
    """Parse the mark; marks of older versions have no number and count as one end."""
    text = os.pread(handle, LENGTH, 0).decode("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines()]
    if not lines or not lines[0]:
        return Left()
    crash = next((line.removeprefix(CRASHED) for line in lines if line.startswith(CRASHED)), "")
    before = int(lines[1]) if len(lines) > 1 and lines[1].isdecimal() and len(lines[1]) < 4 else 0
    return Left(lines[0], before + 1, crash)


def _write_nothing(case: str) -> None:
    pass
