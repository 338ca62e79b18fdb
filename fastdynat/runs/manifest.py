"""Manifest of a checkpoint folder: the digests of its files, and the run that made it."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastdynat.documents import open_file, read_json
from fastdynat.documents.files import GIB, MIB
from fastdynat.documents.numbers import Count, FileName
from fastdynat.errors import UserError
from fastdynat.runs.atomic_files import write_text
from fastdynat.runs.failures import explained_reading

MANIFEST = "checkpoint.json"
FORMAT = "fastdynat-checkpoint/1"


@dataclass(frozen=True)
class Origin:
    """The checkpoint's place in its run; manifests of early versions have none.

    Attributes:
        run: the run's id.
        folder: the folder's name in RUN/checkpoints; a copy under another name does not belong to the run.
        order: number of the checkpoint in its run, increasing.
        best: the best one so far.
        epoch: completed epochs.
        epoch_step: updates done in the epoch after them.
    """

    run: str
    folder: str
    order: int
    best: bool
    epoch: int
    epoch_step: int


@dataclass(frozen=True)
class Manifest:
    """Digests (sha256) by file name, and the origin, if it is known."""

    files: dict[str, str]
    origin: Origin | None


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """The document in the file."""

    sha256: dict[FileName, str]
    run: str | None = None
    folder: str | None = None
    order: Count | None = None
    best: bool | None = None
    epoch: Count | None = None
    epoch_step: Count | None = None


def sha256(path: Path) -> str:
    """The file's digest as hexadecimal text.

    Raises:
        UserError: it cannot be read; or it is large and nearly all of it is a hole, as after a stray
            `truncate`, whose digest would take minutes and match nothing.
    """
    with explained_reading(path), open_file(path) as file:
        about = os.fstat(file.fileno())
        if about.st_size > GIB and about.st_blocks * 512 < about.st_size // 1000:
            raise UserError(
                f"{path} is damaged: {about.st_size:,} bytes, nearly all of which were never written"
            )
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, origin: Origin | None = None) -> None:
    """Write the manifest of `folder` with the digest of every file in it, which must be complete."""
    files = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    put_manifest(folder, Manifest(files, origin))


def put_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest` into `folder`."""
    document: dict[str, Any] = {"format": FORMAT, "sha256": manifest.files}
    if manifest.origin is not None:
        document |= asdict(manifest.origin)
    write_text(folder / MANIFEST, json.dumps(document, indent=2) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """The manifest in `folder`; the files that it lists are not read.

    Raises:
        UserError: there is none, it cannot be read, or it is another document.
    """
    manifest = folder / MANIFEST
    if not os.path.lexists(manifest):
        raise UserError(f"{folder} is not a fastdynat checkpoint: it has no {MANIFEST}")
    about = read_json(manifest, _Stored, what="a fastdynat manifest", format=FORMAT, limit=MIB)
    parts = (about.run, about.folder, about.order, about.best, about.epoch, about.epoch_step)
    return Manifest(about.sha256, None if None in parts else Origin(*parts))  # type: ignore[arg-type]


def check_manifest(folder: Path, *, optional: tuple[str, ...] = ()) -> None:
    """Check that the files of `folder` are those that were written; files in `optional` may be gone.

    Raises:
        UserError: a file is missing, truncated, edited or another run's.
    """
    for name, digest in read_manifest(folder).files.items():
        path = folder / name
        if not path.is_file():
            if name in optional:
                continue
            raise UserError(f"{path} is missing from the checkpoint")
        if sha256(path) != digest:
            raise UserError(f"{path} is damaged or was changed: its sha256 is not the one in {MANIFEST}")
