"""`--overwrite`: the files that an old run made are removed from its folder; others stay."""

import os
import re
from contextlib import suppress
from pathlib import Path

from fastdynat.runs.checkpoints import CheckpointStore, is_copied, is_replaceable, remove_checkpoint
from fastdynat.runs.find import CheckpointFolder, identity_of, own_checkpoints
from fastdynat.runs.layout import BEST, CHECKPOINTS, ENVIRONMENT, LAST, MADE, METRICS, TABLE, real
from fastdynat.runs.manifest import read_manifest


def remove_run(path: Path) -> list[Path]:
    """Remove everything but the configuration of the run in `path`, if there is one.

    A link in the place of a file or folder of the run is removed, its target is not. Returns the paths that
    stay because the run did not make them.
    """
    checkpoints = _checkpoints(path)
    for name in (ENVIRONMENT, METRICS, TABLE):
        (path / name).unlink(missing_ok=True)
    for checkpoint in checkpoints:
        remove_checkpoint(checkpoint)
    for name in (LAST, BEST):
        if (path / name).is_symlink() or is_replaceable(path / name):
            (path / name).unlink(missing_ok=True)
    CheckpointStore(path, identity_of(path) or "").drop_partial()
    kept = _empty(path / CHECKPOINTS, None)
    for name, made in MADE.items():
        kept += _empty(path / name, made)
    kept += [path / name for name in (LAST, BEST) if os.path.lexists(path / name)]
    return kept


def _checkpoints(path: Path) -> list[CheckpointFolder]:
    """All checkpoints of the run, also those that only RUN/last and RUN/best lead to."""
    found = {real(checkpoint.folder): checkpoint for checkpoint in own_checkpoints(path)}
    if (path / CHECKPOINTS).is_symlink():
        found = {}
    identity = identity_of(path)
    for role in (LAST, BEST):
        if is_copied(path / role, identity or ""):
            found[real(path / role)] = CheckpointFolder(path / role, read_manifest(path / role))
    return list(found.values())


def _empty(folder: Path, made: re.Pattern[str] | None) -> list[Path]:
    """Remove the files in `folder` whose names match `made`, and the folder if empty; returns the rest."""
    if folder.is_symlink():
        folder.unlink()
        return []
    if not folder.is_dir():
        return [folder] if os.path.lexists(folder) else []
    for path in folder.iterdir():
        if made is not None and made.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink()
    left = sorted(folder.iterdir())
    if not left:
        with suppress(OSError):
            folder.rmdir()
    return left
