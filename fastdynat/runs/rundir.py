"""The run directory: one folder that holds everything about a run, consistent at every moment.

RUN/config.yaml          resolved configuration
RUN/environment.json     machine and versions, one entry per start
RUN/metrics.jsonl, .csv  one row per epoch
RUN/evaluations          results of `fastdynat eval`, one file per measurement
RUN/boundary             margins and speeds of the boundary, with --boundary-speed
RUN/last, RUN/best       links to checkpoints/NNNNNN: model and guide weights; in last also the training state
"""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO

from fastdynat.errors import UserError
from fastdynat.runs.files import point, sync_folder, write_text
from fastdynat.runs.manifest import write_manifest

CONFIG, ENVIRONMENT, STATE = "config.yaml", "environment.json", "state.pt"
LAST, BEST, LOCK = "last", "best", ".lock"
HEADER = "# fastdynat run"  # first line of a run's configuration
# All that a run keeps in its folder, and all that replacing it may remove.
OWNED = (ENVIRONMENT, "metrics.jsonl", "metrics.csv", LAST, BEST, "boundary", "evaluations", "tensorboard", "checkpoints")


def looks_like_run(path: Path) -> bool:
    """Whether `path` holds a configuration that a run wrote (other tools have a config.yaml too)."""
    try:
        with (path / CONFIG).open("rb") as file:
            return file.readline().rstrip() == HEADER.encode()
    except OSError:
        return False


def free_name(stem: str, parent: Path = Path("runs")) -> Path:
    """``runs/STEM``, or the first free of ``runs/STEM-2``, ``-3``, ..."""
    path, number = parent / stem, 1
    while path.exists():
        number += 1
        path = parent / f"{stem}-{number}"
    return path


def check_new(path: Path, *, overwrite: bool) -> None:
    """Refuse a folder that a new run must not use, before any work is done and without changing anything.

    Raises:
        UserError: it holds a run (and `overwrite` is off), holds something else, or cannot be written.
    """
    try:
        refuse_occupied(path, overwrite=overwrite)
        missing = [p for p in (path, *path.parents) if not p.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / ".probe"
            probe.touch()
            probe.unlink()
        finally:
            for made in missing:
                if made.is_dir() and not any(made.iterdir()):
                    made.rmdir()
    except OSError as error:
        raise UserError(f"cannot write to the run directory {path}: {error.strerror}") from None


def refuse_occupied(path: Path, *, overwrite: bool) -> None:
    """Raise UserError if `path` holds a run (unless `overwrite`) or anything else."""
    # A start that was killed before it wrote its configuration leaves these two.
    if not path.is_dir() or all(p.name in (LOCK, f".{CONFIG}.tmp") for p in path.iterdir()):
        return
    if not looks_like_run(path):
        raise UserError(f"{path} is not empty and holds no run; choose another --run-dir")
    if not overwrite:
        raise UserError(f"{path} already holds a run: continue it with --resume {path}, or replace it with --overwrite")


def lock(folder: Path) -> IO[str]:
    """Keep other fastdynat processes out of `folder` until the file that is returned is closed.

    Raises:
        UserError: another process is in there.
    """
    file = (folder / LOCK).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(f"{folder} is in use by another fastdynat process") from None
    return file


class RunDir:
    """An open run directory, locked against a second process until `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = lock(path)

    @classmethod
    def create(cls, path: Path, config: str, *, overwrite: bool) -> "RunDir":
        """Begin a new run in `path`; an old one there is removed if `overwrite`."""
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path)
        try:
            refuse_occupied(path, overwrite=overwrite)  # again: another process may have been here since the first check
        except UserError:
            run.close()
            raise
        for old in (path / name for name in OWNED):
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old)
            else:
                old.unlink(missing_ok=True)
        # The configuration goes last, in one step: until then the folder is still a run, the old one at its start.
        write_text(path / CONFIG, f"{HEADER}\n{config}")
        return run

    def rewrite_config(self, config: str) -> None:
        """Replace the stored configuration."""
        write_text(self.path / CONFIG, f"{HEADER}\n{config}")

    @classmethod
    def open(cls, path: Path) -> "RunDir":
        """Open an existing run.

        Raises:
            UserError: `path` is not a run, cannot be written, or is in use.
        """
        require_run(path)
        try:
            run = cls(path)
            run._relink()
        except OSError as error:
            raise UserError(f"cannot write to the run directory {path}: {error.strerror}") from None
        return run

    def _relink(self) -> None:
        """A copy that followed links holds folders where `last` and `best` were links; make them links again."""
        for name in (LAST, BEST):
            copied = self.path / name
            if copied.is_dir() and not copied.is_symlink():
                final = self._next()
                copied.rename(final)
                point(copied, os.path.relpath(final, self.path))

    def _next(self) -> Path:
        """The folder of the next checkpoint."""
        store = self.path / "checkpoints"
        store.mkdir(exist_ok=True)
        return store / f"{1 + max((int(p.name) for p in store.iterdir() if p.name.isdigit()), default=0):06d}"

    def close(self) -> None:
        self._lock.close()

    def commit(self, write: Callable[[Path], None], *, best: bool) -> None:
        """Let `write` fill a new checkpoint folder, then make it `last` (and `best`) in one step each."""
        final = self._next()
        store, temporary = final.parent, final.parent / ".partial"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write(temporary)
        write_manifest(temporary)
        sync_folder(temporary)
        temporary.rename(final)
        sync_folder(store)
        # `best` first: a kill in between is repaired by the resumed run, which starts from the old `last` and comes here again.
        if best:
            point(self.path / BEST, os.path.relpath(final, self.path))
        point(self.path / LAST, os.path.relpath(final, self.path))
        sync_folder(self.path)
        self._drop_unreferenced(store)

    def _drop_unreferenced(self, store: Path) -> None:
        last, best = (self.path / name for name in (LAST, BEST))
        kept = {link.resolve() for link in (last, best) if link.exists()}
        for folder in store.iterdir():
            if folder.resolve() not in kept:
                shutil.rmtree(folder)
            elif folder.resolve() != last.resolve():
                (folder / STATE).unlink(missing_ok=True)


def require_run(path: Path) -> None:
    """Raise UserError unless `path` is a run directory."""
    if not os.path.exists(path):  # False, not an error, where a parent may not be entered
        raise UserError(f"no run at {path}")
    if not looks_like_run(path):
        raise UserError(f"{path} is not a run directory: it has no {CONFIG} written by fastdynat")
