"""The manifest of a checkpoint folder: which files belong together, byte for byte, and which run made it
when.
"""

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
    """What a manifest says beside the digests; manifests from before it was there lack it.

    Attributes:
        run: the run's id.
        folder: the checkpoint's own name in RUN/checkpoints; a copy under another name is not the run's.
        order: counts the run's checkpoints.
        best: this is the best one so far.
        epoch: completed ones.
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
    """A manifest as it is read: sha256 by file name, and the origin where there is one."""

    files: dict[str, str]
    origin: Origin | None


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """A manifest as the file holds it; other keys are other readers'."""

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
        UserError: it cannot be read, or is large and nearly all of it was never written, as after a stray
            `truncate`: its digest would take minutes, and is none that anybody stored.
    """
    with explained_reading(path), open_file(path) as file:
        about = os.fstat(file.fileno())
        if about.st_size > GIB and about.st_blocks * 512 < about.st_size // 1000:
            raise UserError(
                f"{path} is damaged: {about.st_size:,} bytes, nearly all of which were never written"
            )
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, origin: Origin | None = None) -> None:
    """Record the digest of every file in `folder`; to be written last."""
    files = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    put_manifest(folder, Manifest(files, origin))


def put_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest` into `folder`."""
    document: dict[str, Any] = {"format": FORMAT, "sha256": manifest.files}
    if manifest.origin is not None:
        document |= asdict(manifest.origin)
    write_text(folder / MANIFEST, json.dumps(document, indent=2) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """What the manifest in `folder` says; the files themselves are not looked at.

    Raises:
        UserError: there is none, it cannot be read, or it is not one.
    """
    manifest = folder / MANIFEST
    if not os.path.lexists(manifest):
        raise UserError(f"{folder} is not a fastdynat checkpoint: it has no {MANIFEST}")
    about = read_json(manifest, _Stored, what="a fastdynat manifest", format=FORMAT, limit=MIB)
    parts = (about.run, about.folder, about.order, about.best, about.epoch, about.epoch_step)
    return Manifest(about.sha256, None if None in parts else Origin(*parts))  # type: ignore[arg-type]


def check_manifest(folder: Path, *, optional: tuple[str, ...] = ()) -> None:
    """Check that `folder` holds exactly the bytes it was written with; files in `optional` may be gone.

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
