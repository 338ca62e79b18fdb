"""Reading side of RUN/checkpoints: the run's own folders in it, the newest and the best of them.

A folder is the run's own if its manifest names the run and the folder. Manifests also say which is the newest
and which the best; RUN/last and RUN/best are links for people, and a copy without them lacks nothing.
"""

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fastdynat.errors import UserError
from fastdynat.runs.layout import BEST, CHECKPOINTS, LAST, METRICS, STATE, real, run_id
from fastdynat.runs.manifest import MANIFEST, Manifest, Origin, read_manifest
from fastdynat.runs.metrics_rows import best_epoch
from fastdynat.runs.sidecar import completed_epochs

NUMBERED = re.compile(r"[0-9]{6,12}")


@dataclass(frozen=True)
class CheckpointFolder:
    """A checkpoint folder with its manifest. `best`: it was the best when it was written."""

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


def own_checkpoints(run: Path) -> list[CheckpointFolder]:
    """The run's own checkpoints, oldest first; their files are not checked."""
    found, identity = _with_manifests(run), identity_of(run)
    own = (
        checkpoint for checkpoint in found if is_own(checkpoint.folder, checkpoint.manifest.origin, identity)
    )
    return sorted(own, key=lambda checkpoint: checkpoint.order)


def identity_of(run: Path) -> str | None:
    """The run's id: in its configuration, or else the one that all its checkpoints name.

    None for a run of a version without ids.
    """
    if (written := run_id(run)) is not None:
        return written
    origins = [(c.manifest.origin, c.folder.name) for c in _with_manifests(run)]
    named = {origin.run for origin, name in origins if origin is not None and origin.folder == name}
    return named.pop() if len(named) == 1 else None


def _with_manifests(run: Path) -> list[CheckpointFolder]:
    """All folders in RUN/checkpoints with a manifest, of this run or another."""
    found = []
    for folder in real_folders(run / CHECKPOINTS):
        with suppress(UserError):
            found.append(CheckpointFolder(folder, read_manifest(folder)))
    return found


def real_folders(store: Path) -> list[Path]:
    """The folders in `store`, without symbolic links."""
    try:
        return sorted(path for path in store.iterdir() if path.is_dir() and not path.is_symlink())
    except OSError:
        return []


def is_own(folder: Path, origin: Origin | None, identity: str | None) -> bool:
    """True if `folder` belongs to the run with the id `identity`, by its manifest's `origin`."""
    if origin is None:  # a version without run ids
        return identity is None and NUMBERED.fullmatch(folder.name) is not None
    return origin.folder == folder.name and identity in (origin.run, None)


def find_checkpoint(run: Path, role: str) -> Path | None:
    """The folder of the newest (`role` last) or the best (`role` best) checkpoint of `run`, or None.

    The link counts where manifests say nothing: in a run of a version without ids, and where a copy put a
    folder in the place of the link.
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
        # A damaged checkpoint of the run is an error, not passed over; a user's folder is ignored.
        ours = (run / role).is_symlink() or os.path.lexists(named / MANIFEST)
        return named if ours and named.is_relative_to(real(run)) else found.folder
    copied = origin is not None and origin.run == identity_of(run) and origin.order > found.order[0]
    foreign = named.is_relative_to(real(run)) and (origin is None or origin.run != identity_of(run))
    return named if copied or foreign else found.folder


def _named(run: Path, role: str) -> Path | None:
    """The folder at RUN/ROLE, links followed."""
    path = run / role
    return real(path) if path.is_dir() else None


def _unnamed(run: Path, own: list[CheckpointFolder], role: str) -> Path | None:
    """The newest or best checkpoint of a run of a version without ids whose links are gone."""
    resumable = [checkpoint.folder for checkpoint in own if (checkpoint.folder / STATE).is_file()]
    others = [checkpoint.folder for checkpoint in own if checkpoint.folder not in resumable]
    if role == LAST:
        return resumable[-1] if resumable else None
    if others:  # only the newest keeps its state
        return others[-1]
    return (
        resumable[-1] if resumable and completed_epochs(resumable[-1]) == best_epoch(run / METRICS) else None
    )


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint that `run` continues from; None where there is none.

    Raises:
        UserError: one is there, but it may not be the newest.
    """
    found = find_checkpoint(run, LAST)
    if found is None and (best := find_checkpoint(run, BEST)) is not None:
        raise UserError(
            f"{run} has a best checkpoint ({best.name}) but none to resume from: restore its last checkpoint"
        )
    if found is not None and not NUMBERED.fullmatch(found.name):
        return found
    for folder in real_folders(run / CHECKPOINTS):
        newer = NUMBERED.fullmatch(folder.name) and (found is None or int(folder.name) > int(found.name))
        if not newer or not os.path.lexists(folder / MANIFEST):
            continue
        read_manifest(folder)  # raises where it is damaged
    return found
