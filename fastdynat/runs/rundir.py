"""Run directory: one folder that holds everything about a run, consistent at every moment.

RUN/config.yaml          resolved configuration, and the run's id
RUN/environment.json     machine and versions, one entry per start
RUN/metrics.jsonl, .csv  one row per epoch
RUN/evaluations          results of `fastdynat eval`, one file per measurement
RUN/boundary             margins and speeds of the boundary, with --boundary-speed
RUN/checkpoints/NNNNNN   model and guide weights; in the newest also the training state
RUN/last, RUN/best       links to two of them
"""

import fcntl
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from fastdynat.errors import UserError
from fastdynat.runs.atomic_files import TEMPORARY, drop_leftovers, write_text
from fastdynat.runs.checkpoints import CheckpointStore
from fastdynat.runs.failures import explained
from fastdynat.runs.find import identity_of
from fastdynat.runs.layout import (
    BOUNDARY,
    CHECKPOINTS,
    CONFIG,
    ENVIRONMENT,
    LOCK,
    METRICS,
    TABLE,
    TENSORBOARD,
    config_text,
    looks_like_run,
    new_id,
    real,
    require_run,
)
from fastdynat.runs.replace import remove_run

# Written by training.
WRITTEN_FILES, WRITTEN_FOLDERS = (ENVIRONMENT, METRICS, TABLE), (BOUNDARY, TENSORBOARD, CHECKPOINTS)
WRITTEN = (CONFIG, *WRITTEN_FILES, *WRITTEN_FOLDERS)
OLD_LEFTOVER = f".{CONFIG}.tmp"  # a killed start left it, before temporary files had their present names


def free_name(stem: str, parent: Path = Path("runs")) -> Path:
    """``runs/STEM``, or the first free of ``runs/STEM-2``, ``-3``, ..."""
    path, number = parent / stem, 1
    while os.path.lexists(path):
        number += 1
        path = parent / f"{stem}-{number}"
    return path


def claim_name(stem: str, parent: Path = Path("runs")) -> Path:
    """Make the folder that `free_name` names; processes that ask at the same time get one each.

    Raises:
        WriteError: the system refuses.
    """
    with explained(parent / stem):
        while True:
            path = free_name(stem, parent)
            parent.mkdir(parents=True, exist_ok=True)
            try:
                path.mkdir()
            except FileExistsError:  # another process was faster
                continue
            except FileNotFoundError:  # `parent` was removed in the meantime
                continue
            return path


def release_name(path: Path) -> None:
    """Remove a claimed folder, if it holds nothing but a lock file."""
    try:
        if {p.name for p in path.iterdir()} <= {LOCK}:
            (path / LOCK).unlink(missing_ok=True)
            path.rmdir()
    except OSError:
        pass


class OccupiedError(UserError):
    """The folder `path` of a new run holds one already."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path} already holds a run: continue it with --resume {path}, or replace it with --overwrite"
        )
        self.path = path


def check_new(path: Path, *, overwrite: bool) -> None:
    """Refuse a folder that a new run must not use, before any work is done and without changing anything.

    Raises:
        UserError: it holds a run (and `overwrite` is off), holds something else, or cannot be written.
    """
    try:
        refuse_occupied(path, overwrite=overwrite)
        place = path
        while not _is_there(place):
            place = place.parent
        tempfile.TemporaryDirectory(prefix=".fastdynat-", dir=place).cleanup()
    except OSError as error:
        raise UserError(
            f"cannot write to the run directory {path}: {error.strerror}; choose another --run-dir, or "
            "change its permissions"
        ) from None


def _is_there(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise
        return False
    return True


def refuse_occupied(path: Path, *, overwrite: bool) -> None:
    """Raise UserError if `path` holds a run (OccupiedError, unless `overwrite`) or anything else."""
    if not path.is_dir() or all(_is_leftover(p.name) for p in path.iterdir()):
        return
    if not looks_like_run(path):
        raise UserError(f"{path} is not empty and holds no run; choose another --run-dir")
    if not overwrite:
        raise OccupiedError(path)
    refuse_kinds(path, links_go=True)


def _is_leftover(name: str) -> bool:
    """True if `name` may be left from a start that was killed before it wrote its configuration."""
    return name in (LOCK, OLD_LEFTOVER) or TEMPORARY.fullmatch(name) is not None


def lock_folder(folder: Path, *, seconds: float = 0.0) -> IO[str]:
    """Keep other fastdynat processes out of `folder` until the file that is returned is closed.

    Args:
        seconds: to wait for another process that uses it.

    Raises:
        UserError: another process uses it, or the lock file is not a file.
    """
    path = folder / LOCK
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UserError(f"{path} is not the lock file of a run; remove it")
    file, until = path.open("a"), time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() < until:
                time.sleep(0.2)
                continue
            file.close()
            raise UserError(f"{folder} is in use by another fastdynat process") from None
        return file


class RunDir:
    """An open run directory, locked against a second process until `close`.

    Attributes:
        kept: paths that `create` left in the folder of the run that it replaced, because that run had not
            made them.
    """

    def __init__(self, path: Path, *, lock_seconds: float = 0.0) -> None:
        """`lock_seconds`: to wait for another process that uses it."""
        self.path = path
        self.kept: list[Path] = []
        self._lock = lock_folder(path, seconds=lock_seconds)
        self.identity = identity_of(path) or new_id()
        self.checkpoints = CheckpointStore(path, self.identity)

    @classmethod
    def create(cls, path: Path, config: str, *, overwrite: bool, lock_seconds: float = 0.0) -> "RunDir":
        """Start a new run in `path`; an old one there is removed if `overwrite`."""
        with explained(path):
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path, lock_seconds=lock_seconds)
        try:
            with explained(path):
                # Again: another process may have been here since the first check.
                refuse_occupied(path, overwrite=overwrite)
                run.kept = remove_run(path)
                drop_leftovers(path)
                (path / OLD_LEFTOVER).unlink(missing_ok=True)
            run.identity = new_id()
            run.checkpoints = CheckpointStore(path, run.identity)
            # The configuration is written last, in one step: until then the folder holds the old run, before
            # its first epoch.
            run.rewrite_config(config)
        except BaseException:
            run.close()
            raise
        return run

    def rewrite_config(self, config: str) -> None:
        """Replace the stored configuration."""
        write_text(self.path / CONFIG, config_text(config, self.identity))

    @classmethod
    def open(cls, path: Path | str, *, lock_seconds: float = 0.0) -> "RunDir":
        """Open an existing run.

        Raises:
            UserError: `path` is not a run, cannot be written, is in use, or has a link out of it, or another
                kind of file, in the place of one of its own.
        """
        path = Path(path)
        require_run(path)
        _refuse_links(path)
        refuse_kinds(path)
        try:
            run = cls(path, lock_seconds=lock_seconds)
        except OSError as error:
            raise UserError(
                f"cannot write to the run directory {path}: {error.strerror}; change its permissions"
            ) from None
        drop_leftovers(path)
        run.checkpoints.drop_partial()
        return run

    def close(self) -> None:
        self._lock.close()

    def adopt(self) -> None:
        """Bring the checkpoints of a run of an older version, or of a copied run, into the present form."""
        with explained(self.path / CHECKPOINTS):
            self.checkpoints.adopt()

    def commit(
        self, write: Callable[[Path], None], *, best: bool, epoch: int = 0, epoch_step: int = 0
    ) -> None:
        """Let `write` fill a new checkpoint folder, then make it the newest (and the best) in one step.

        Args:
            epoch, epoch_step: completed epochs, and updates done in the one after them.

        Raises:
            WriteError: it could not be written; the checkpoints before are untouched.
        """
        self.checkpoints.add(write, best=best, epoch=epoch, epoch_step=epoch_step)


def refuse_kinds(path: Path, *, links_go: bool = False) -> None:
    """Raise UserError where training would write a file but a folder exists, or the reverse.

    links_go: links, and what only a file can replace, will be removed first (`remove_run`).
    """
    for name in (*WRITTEN_FILES, *WRITTEN_FOLDERS):
        place, folder = path / name, name in WRITTEN_FOLDERS
        if links_go and (place.is_symlink() or not (folder or place.is_dir())):
            continue
        if place.is_dir() if folder else place.is_file():
            continue
        # Writing through a link can make a missing file, but not a missing folder.
        if os.path.lexists(place) and (folder or place.is_dir() or not _leads_nowhere(place)):
            raise UserError(
                f"{place} is not a {'folder' if folder else 'file'}, as a run has there; move it away"
            )


def _leads_nowhere(link: Path) -> bool:
    try:
        link.stat()
    except FileNotFoundError:
        return True
    except OSError:  # a link to itself
        return False
    return False


def _refuse_links(path: Path) -> None:
    """Raise UserError where training would write outside the run."""
    for place in (path / name for name in WRITTEN):
        if place.is_symlink() and not real(place).is_relative_to(real(path)):
            raise UserError(
                f"{place} is a symbolic link out of the run, to {os.readlink(place)}: nothing is "
                "written or removed there; put the file or folder itself in its place"
            )
