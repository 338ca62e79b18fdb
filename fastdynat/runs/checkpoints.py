"""RUN/checkpoints: which folders in it are the run's own, and which of them is the newest and the best.

A folder is the run's own if its manifest names the run and the folder. The newest and the best are found by what manifests say;
RUN/last and RUN/best are links for people, and a run that was copied without them lacks nothing. Only folders of the run's own
are ever removed, of them only what their manifests list, and no symbolic link is followed on the way.
"""

import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from fastdynat.documents import read_json, read_json_lines
from fastdynat.documents.numbers import Count
from fastdynat.errors import UserError
from fastdynat.runs.failures import explained
from fastdynat.runs.files import point, sync_folder
from fastdynat.runs.layout import BEST, CHECKPOINTS, LAST, METRICS, STATE, real, run_id
from fastdynat.runs.manifest import MANIFEST, Manifest, Origin, put_manifest, read_manifest, sha256, write_manifest

NUMBERED = re.compile(r"[0-9]{6,12}")
# What lies in the folder `.partial` that versions before ids left when they were killed.
OLD_PARTIAL = re.compile(r"(model|model_raw|guide)\.(safetensors|json)|state\.pt|checkpoint\.json|\.[a-z_]+\.json\.tmp")


@dataclass(frozen=True)
class Checkpoint:
    """A folder of the run's own; `best`: the best one when it was written."""

    folder: Path
    manifest: Manifest

    @property
    def order(self) -> tuple[int, int]:
        """Increases with time."""
        number = int(self.folder.name) if NUMBERED.fullmatch(self.folder.name) else 0
        return (0 if self.manifest.origin is None else self.manifest.origin.order), number

    @property
    def best(self) -> bool:
        return self.manifest.origin is not None and self.manifest.origin.best


def own_checkpoints(run: Path) -> list[Checkpoint]:
    """The run's own checkpoints, the newest last; their files are not looked at."""
    found, identity = _with_manifests(run), identity_of(run)
    own = (checkpoint for checkpoint in found if is_own(checkpoint.folder, checkpoint.manifest.origin, identity))
    return sorted(own, key=lambda checkpoint: checkpoint.order)


def identity_of(run: Path) -> str | None:
    """The run's id, as its configuration says; where that does not, the one that all its checkpoints name, if they do.

    None of a run from before there was one.
    """
    if (written := run_id(run)) is not None:
        return written
    origins = [(c.manifest.origin, c.folder.name) for c in _with_manifests(run)]
    named = {origin.run for origin, name in origins if origin is not None and origin.folder == name}
    return named.pop() if len(named) == 1 else None


def _with_manifests(run: Path) -> list[Checkpoint]:
    """All folders in RUN/checkpoints with a manifest, whosever they are."""
    found = []
    for folder in real_folders(run / CHECKPOINTS):
        with suppress(UserError):
            found.append(Checkpoint(folder, read_manifest(folder)))
    return found


def real_folders(store: Path) -> list[Path]:
    """The folders in `store` that are no links."""
    try:
        return sorted(path for path in store.iterdir() if path.is_dir() and not path.is_symlink())
    except OSError:
        return []


def is_own(folder: Path, origin: Origin | None, identity: str | None) -> bool:
    """Whether the manifest in `folder` is of the run with the id `identity`."""
    if origin is None:  # from before manifests said it
        return identity is None and NUMBERED.fullmatch(folder.name) is not None
    return origin.folder == folder.name and identity in (origin.run, None)


def find_checkpoint(run: Path, role: str) -> Path | None:
    """The folder of the newest (`role` last) or the best (`role` best) checkpoint of `run`; None where there is none.

    What the link says counts where manifests do not: in a run from before they did, and where the link is, instead, a folder
    that a copy put there.
    """
    own, named = own_checkpoints(run), _named(run, role)
    if identity_of(run) is None:
        return named or _unnamed(run, own, role)
    wanted = [checkpoint for checkpoint in own if role == LAST or checkpoint.best]
    found = wanted[-1] if wanted else None
    if named is None or any(named == real(checkpoint.folder) for checkpoint in own):
        return None if found is None else found.folder
    if found is None:
        return named
    try:
        origin = read_manifest(named).origin
    except UserError:
        # A damaged checkpoint of the run is not passed over for an older one; a folder of the user's is.
        ours = (run / role).is_symlink() or os.path.lexists(named / MANIFEST)
        return named if ours and named.is_relative_to(real(run)) else found.folder
    copied = origin is not None and origin.run == identity_of(run) and origin.order > found.order[0]
    foreign = named.is_relative_to(real(run)) and (origin is None or origin.run != identity_of(run))
    return named if copied or foreign else found.folder


def _named(run: Path, role: str) -> Path | None:
    """The folder that RUN/ROLE is, links followed."""
    path = run / role
    return real(path) if path.is_dir() else None


def _unnamed(run: Path, own: list[Checkpoint], role: str) -> Path | None:
    """The newest or best checkpoint of a run whose manifests do not say it and whose links are gone."""
    resumable = [checkpoint.folder for checkpoint in own if (checkpoint.folder / STATE).is_file()]
    others = [checkpoint.folder for checkpoint in own if checkpoint.folder not in resumable]
    if role == LAST:
        return resumable[-1] if resumable else None
    if others:  # only the newest keeps its state
        return others[-1]
    return resumable[-1] if resumable and _epoch(resumable[-1]) == _best_epoch(run) else None


def _best_epoch(run: Path) -> int | None:
    """The last epoch that the metrics call the best."""
    with suppress(UserError):
        rows = read_json_lines(run / METRICS, _Row, what="a run's metrics")
        return max((row.epoch for row in rows if row.best), default=None)
    return None


@dataclass(frozen=True, kw_only=True)
class _Row:
    """Of the metrics."""

    epoch: Count
    best: bool | None = None


def _epoch(folder: Path) -> int:
    """Completed epochs of the checkpoint, as its sidecar says; 0 where that is damaged."""
    with suppress(UserError):
        return read_json(folder / "model.json", _Epoch, what="a sidecar").epoch
    return 0


@dataclass(frozen=True, kw_only=True)
class _Epoch:
    """Of a sidecar."""

    epoch: Count


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint that `run` goes on from; None where there is none.

    Raises:
        UserError: there is one, but it is in doubt whether it is the newest.
    """
    found = find_checkpoint(run, LAST)
    if found is None and (best := find_checkpoint(run, BEST)) is not None:
        raise UserError(f"{run} has a best checkpoint ({best.name}) but none to resume from: bring its last checkpoint back")
    if found is not None and not NUMBERED.fullmatch(found.name):
        return found
    for folder in real_folders(run / CHECKPOINTS):
        newer = NUMBERED.fullmatch(folder.name) and (found is None or int(folder.name) > int(found.name))
        if not newer or not os.path.lexists(folder / MANIFEST):
            continue
        read_manifest(folder)  # says what is wrong with it, where something is
    return found


class CheckpointStore:
    """The checkpoints of a run that this process holds the lock of."""

    def __init__(self, run: Path, identity: str) -> None:
        self.run, self.identity, self.store = run, identity, run / CHECKPOINTS
        self._partial = self.store / f".partial-{identity}"

    def add(self, write: Callable[[Path], None], *, best: bool, epoch: int, epoch_step: int) -> None:
        """Let `write` fill a new checkpoint folder, then make it the newest (and the best) in one step.

        Raises:
            WriteError: it could not be written; the ones before are untouched.
        """
        with explained(self.store):
            self.store.mkdir(exist_ok=True)
            final = self.next_folder()
            order = 1 + max((c.order[0] for c in own_checkpoints(self.run)), default=0)
            self.drop_partial()
            try:
                self._partial.mkdir()
                write(self._partial)
                write_manifest(self._partial, Origin(self.identity, final.name, order, best, epoch, epoch_step))
                sync_folder(self._partial)
                self._partial.rename(final)
            except BaseException:
                self.drop_partial()
                raise
            sync_folder(self.store)
        self.link()
        self._prune()

    def next_folder(self) -> Path:
        """A folder that is not there yet, with a number above all others."""
        number = 1 + max((int(p.name) for p in self.store.iterdir() if NUMBERED.fullmatch(p.name)), default=0)
        return self.store / f"{number:06d}"

    def drop_partial(self) -> None:
        """Remove what a kill left of a checkpoint that was being written; its name holds the run's id."""
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
        """Point RUN/last and RUN/best at the newest and the best, unless something else is there or links cannot be made."""
        own = own_checkpoints(self.run)
        for role, chosen in ((BEST, [c for c in own if c.best]), (LAST, own)):
            path = self.run / role
            target = f"{CHECKPOINTS}/{chosen[-1].folder.name}" if chosen else ""
            if chosen and is_replaceable(path) and not (path.is_symlink() and os.readlink(path) == target):
                with suppress(OSError):
                    point(path, target)
        with suppress(OSError):
            sync_folder(self.run)

    def _prune(self) -> None:
        """Remove what is neither the newest nor the best, and the training state of what is not the newest."""
        own = own_checkpoints(self.run)
        best = [checkpoint for checkpoint in own if checkpoint.best][-1:]
        for checkpoint in own[:-1]:
            if checkpoint not in best:
                remove_checkpoint(checkpoint)
            elif STATE in checkpoint.manifest.files:
                remove_listed(checkpoint.folder, STATE, checkpoint.manifest.files[STATE])

    def adopt(self) -> None:
        """Make the newest and best checkpoint the run's own by name, where they are not: in a run from before manifests named
        it, and in a copy that followed the links."""
        last, best = find_checkpoint(self.run, LAST), find_checkpoint(self.run, BEST)
        # Both are known before either moves; the newest goes last, so that it is the newest by order too.
        for folder in dict.fromkeys(f for f in (best, last) if f is not None and f.is_relative_to(real(self.run))):
            self._adopt(folder, best=folder == best)
        for role in (BEST, LAST):  # what a copy put in the place of a link to one of the others
            if is_copied(self.run / role, self.identity):
                self._adopt(real(self.run / role), best=role == BEST)

    def _adopt(self, folder: Path, *, best: bool) -> None:
        manifest = read_manifest(folder)
        if is_own(folder, manifest.origin, self.identity) and folder.parent == real(self.store):
            return
        if manifest.origin is not None and manifest.origin.run != self.identity:
            return  # another run's: it may be read but is never touched
        self.store.mkdir(exist_ok=True)
        own = folder.parent == real(self.store) and NUMBERED.fullmatch(folder.name)
        final = folder if own else self.next_folder()
        order = 1 + max((c.order[0] for c in own_checkpoints(self.run)), default=0)
        origin = manifest.origin or Origin(self.identity, final.name, order, best, _epoch(folder), 0)
        listed = Manifest(manifest.files, replace(origin, folder=final.name))
        if final == folder or folder in (real(self.run) / LAST, real(self.run) / BEST):
            put_manifest(folder, listed)
            if final != folder:
                folder.rename(final)
        else:  # the user's place for it: what is there stays
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
    """Whether `path` is a real folder with a checkpoint of the run."""
    if path.is_symlink() or not path.is_dir():
        return False
    try:
        origin = read_manifest(path).origin
    except UserError:
        return False
    return origin is None or origin.run == identity


def is_replaceable(path: Path) -> bool:
    """Whether a link of the run may take the place of `path`: there is nothing, or such a link, or what archives make of it."""
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
    return os.path.dirname(place) == store or os.path.dirname(os.path.realpath(place)) == os.path.realpath(store)


def remove_checkpoint(checkpoint: Checkpoint) -> bool:
    """Remove a checkpoint of the run's own: what its manifest lists, the manifest last. Returns whether the folder is gone."""
    for name, digest in checkpoint.manifest.files.items():
        remove_listed(checkpoint.folder, name, digest)
    if {path.name for path in checkpoint.folder.iterdir()} != {MANIFEST}:
        return False  # something in it is not the run's
    with suppress(OSError):
        (checkpoint.folder / MANIFEST).unlink()
        checkpoint.folder.rmdir()
    return not checkpoint.folder.exists()


def remove_listed(folder: Path, name: str, digest: str) -> None:
    """Remove the file `name` that a manifest lists, unless it is not there or was changed since."""
    path = folder / name
    if path.is_symlink() or not path.is_file():
        return
    with suppress(OSError, UserError):
        written = path.stat().st_mtime_ns <= (folder / MANIFEST).stat().st_mtime_ns
        if written or sha256(path) == digest:
            path.unlink()
