"""A run directory as the processes see it that do not write it."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fastdynat.errors import UserError
from fastdynat.runs.failures import explained

VISIBLE_SECONDS = 20.0  # a network file system may show a new file late


@dataclass(frozen=True)
class SeenRun:
    """The run directory that another process has opened as `RunDir`."""

    path: Path

    def close(self) -> None:
        """Do nothing: this process holds no lock."""


@contextmanager
def marked_folder(path: Path) -> Iterator[Path]:
    """A temporary file in the run directory `path`, or in the nearest folder above it that exists.

    Another machine that sees the file (`require_shared`) shares the folder. Raises WriteError.
    """
    folder = Path(os.path.abspath(path))
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    mark = folder / f".fastdynat-{os.urandom(6).hex()}"
    with explained(mark):
        mark.touch()
    try:
        yield mark
    finally:
        with suppress(OSError):
            mark.unlink(missing_ok=True)


def require_shared(mark: Path, run: Path) -> None:
    """Raise UserError where this machine does not see the file of `marked_folder` for the directory `run`."""
    until = time.monotonic() + VISIBLE_SECONDS
    while not mark.exists():
        if time.monotonic() > until:
            raise UserError(
                f"this machine does not see the run directory {run}, which rank 0 writes: "
                "use a --run-dir on a file system that all machines share"
            )
        time.sleep(0.1)
