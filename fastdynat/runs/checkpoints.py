"""Writing side of RUN/checkpoints: checkpoints are added, linked, adopted and removed.

Only the run's own folders (`fastdynat.runs.find`) are ever removed, only the files that their manifests list,
and no symbolic link is followed on the way.
"""

import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from fastdynat.errors import UserError
from fastdynat.runs.atomic_files import replace_link, sync_folder
from fastdynat.runs.failures import explained
from fastdynat.runs.find import (
    NUMBERED,
    CheckpointFolder,
    find_checkpoint,
    is_own,
    own_checkpoints,
    real_folders,
)
from fastdynat.runs.layout import BEST, CHECKPOINTS, LAST, STATE, real, run_id
from fastdynat.runs.manifest import (
    MANIFEST,
    Manifest,
    Origin,
    put_manifest,
    read_manifest,
    sha256,
    write_manifest,
)
from fastdynat.runs.sidecar import completed_epochs

# Files in the folder `.partial` that versions without run ids left when they were killed.
OLD_PARTIAL = re.compile(
    r"(model|model_raw|guide)\.(safetensors|json)|state\.pt|checkpoint\.json|\.[a-z_]+\.json\.tmp"
)


class CheckpointStore:
    """The checkpoints of a run whose lock this process holds."""

    def __init__(self, run: Path, identity: str) -> None:
        self.run, self.identity, self.store = run, identity, run / CHECKPOINTS
        self._partial = self.store / f".partial-{identity}"

    def add(self, write: Callable[[Path], None], *, best: bool, epoch: int, epoch_step: int) -> None:
        """Let `write` fill a new checkpoint folder, then make it the newest (and the best) in one step.

        Raises:
            WriteError: it could not be written; earlier checkpoints are untouched.
        """
        with explained(self.store):
            self.store.mkdir(exist_ok=True)
            final = self.next_folder()
            order = 1 + max((c.order[0] for c in own_checkpoints(self.run)), default=0)
            self.drop_partial()
            try:
                self._partial.mkdir()
                write(self._partial)
                write_manifest(
                    self._partial, Origin(self.identity, final.name, order, best, epoch, epoch_step)
                )
                sync_folder(self._partial)
                self._partial.rename(final)
            except BaseException:
                self.drop_partial()
                raise
            sync_folder(self.store)
        self.link()
        self._prune()

    def next_folder(self) -> Path:
        """The path of a new folder, with a number above all others."""
        number = 1 + max((int(p.name) for p in self.store.iterdir() if NUMBERED.fullmatch(p.name)), default=0)
        return self.store / f"{number:06d}"

    def drop_partial(self) -> None:
        """Remove a checkpoint that a killed process was writing; its name has the run's id."""
        if self.store.is_symlink():
            return
        if not self._partial.is_symlink():
            shutil.rmtree(self._partial, ignore_errors=True)
        old = self.store / ".partial"
        if run_id(self.run) is not None or old not in real_folders(self.store):
            return
        if all(OLD_PARTIAL.fullmatch(path.name) for path in old.iterdir()):
            shutil.rmtree(old, ignore_errors=True)

    def link(self) -> None:
        """Point RUN/last and RUN/best at the newest and the best checkpoint, where links can be made."""
        own = own_checkpoints(self.run)
        for role, chosen in ((BEST, [c for c in own if c.best]), (LAST, own)):
            path = self.run / role
            target = f"{CHECKPOINTS}/{chosen[-1].folder.name}" if chosen else ""
            if chosen and is_replaceable(path) and not (path.is_symlink() and os.readlink(path) == target):
                with suppress(OSError):
                    replace_link(path, target)
        with suppress(OSError):
            sync_folder(self.run)

    def _prune(self) -> None:
        """Remove all checkpoints but the newest and the best, and the training state of the best."""
        own = own_checkpoints(self.run)
        best = [checkpoint for checkpoint in own if checkpoint.best][-1:]
        for checkpoint in own[:-1]:
            if checkpoint not in best:
                remove_checkpoint(checkpoint)
            elif STATE in checkpoint.manifest.files:
                remove_listed(checkpoint.folder, STATE, checkpoint.manifest.files[STATE])

    def adopt(self) -> None:
        """Make the newest and the best checkpoint the run's own, where their manifests do not say so.

        They do not in a run of a version without run ids, and in a copy that followed the links.
        """
        last, best = find_checkpoint(self.run, LAST), find_checkpoint(self.run, BEST)
        # Both are found before either moves; the newest is adopted last, so that its order is the highest.
        for folder in dict.fromkeys(
            f for f in (best, last) if f is not None and f.is_relative_to(real(self.run))
        ):
            self._adopt(folder, best=folder == best)
        for role in (BEST, LAST):  # folders that a copy put in the place of links
            if is_copied(self.run / role, self.identity):
                self._adopt(real(self.run / role), best=role == BEST)

    def _adopt(self, folder: Path, *, best: bool) -> None:
        manifest = read_manifest(folder)
        if is_own(folder, manifest.origin, self.identity) and folder.parent == real(self.store):
            return
        if manifest.origin is not None and manifest.origin.run != self.identity:
            return  # another run's checkpoint may be read, but is never changed
        self.store.mkdir(exist_ok=True)
        own = folder.parent == real(self.store) and NUMBERED.fullmatch(folder.name)
        final = folder if own else self.next_folder()
        order = 1 + max((c.order[0] for c in own_checkpoints(self.run)), default=0)
        origin = manifest.origin or Origin(
            self.identity, final.name, order, best, completed_epochs(folder), 0
        )
        listed = Manifest(manifest.files, replace(origin, folder=final.name))
        if final == folder or folder in (real(self.run) / LAST, real(self.run) / BEST):
            put_manifest(folder, listed)
            if final != folder:
                folder.rename(final)
        else:  # a place that the user chose: it stays as it is
            self._copy(folder, listed, final)

    def _copy(self, folder: Path, manifest: Manifest, final: Path) -> None:
        self.drop_partial()
        try:
            self._partial.mkdir()
            for name in manifest.files.keys() & {path.name for path in folder.iterdir()}:
                shutil.copyfile(folder / name, self._partial / name)
            put_manifest(self._partial, manifest)
            self._partial.rename(final)
        except BaseException:
            self.drop_partial()
            raise


def is_copied(path: Path, identity: str) -> bool:
    """True if `path` is a folder, not a link, with a checkpoint of the run `identity`."""
    if path.is_symlink() or not path.is_dir():
        return False
    try:
        origin = read_manifest(path).origin
    except UserError:
        return False
    return origin is None or origin.run == identity


def is_replaceable(path: Path) -> bool:
    """True if a link of the run may replace `path`: it is free, such a link, or an archive's copy of one."""
    if not os.path.lexists(path):
        return True
    if path.is_symlink():
        target = os.readlink(path)
    elif path.is_file() and path.stat().st_size < 256:
        target = path.read_bytes().decode("utf-8", "replace").strip()
        if not target:
            return True
    else:
        return False
    place, store = (os.path.normpath(p) for p in (path.parent / target, path.parent / CHECKPOINTS))
    return os.path.dirname(place) == store or os.path.dirname(os.path.realpath(place)) == os.path.realpath(
        store
    )


def remove_checkpoint(checkpoint: CheckpointFolder) -> bool:
    """Remove one of the run's own checkpoints, its manifest last. Returns whether the folder is gone."""
    for name, digest in checkpoint.manifest.files.items():
        remove_listed(checkpoint.folder, name, digest)
    if {path.name for path in checkpoint.folder.iterdir()} != {MANIFEST}:
        return False  # it holds a file that the run did not make
    with suppress(OSError):
        (checkpoint.folder / MANIFEST).unlink()
        checkpoint.folder.rmdir()
    return not checkpoint.folder.exists()


def remove_listed(folder: Path, name: str, digest: str) -> None:
    """Remove the file `name` that a manifest lists, unless it is gone or was changed since."""
    path = folder / name
    if path.is_symlink() or not path.is_file():
        return
    with suppress(OSError, UserError):
        written = path.stat().st_mtime_ns <= (folder / MANIFEST).stat().st_mtime_ns
        if written or sha256(path) == digest:
            path.unlink()
