"""The manifest of a checkpoint folder: which files belong together, byte for byte."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from fastdynat.documents import read_json
from fastdynat.documents.files import MIB
from fastdynat.documents.numbers import FileName
from fastdynat.errors import UserError
from fastdynat.runs.files import write_text

MANIFEST = "checkpoint.json"
FORMAT = "fastdynat-checkpoint/1"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint's manifest says; other keys are other readers'."""

    sha256: dict[FileName, str]


def sha256(path: Path) -> str:
    """The file's digest as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """Record the digest of every file in `folder`; to be written last."""
    files = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    write_text(folder / MANIFEST, json.dumps({"format": FORMAT, "sha256": files}, indent=2) + "\n")


def check_manifest(folder: Path, *, optional: tuple[str, ...] = ()) -> None:
    """Check that `folder` holds exactly the bytes it was written with; files in `optional` may be gone.

    Raises:
        UserError: a file is missing, truncated, edited or another run's.
    """
    manifest = folder / MANIFEST
    if not manifest.exists():
        raise UserError(f"{folder} is not a fastdynat checkpoint: it has no {MANIFEST}")
    promised = read_json(manifest, Manifest, what="a fastdynat manifest", format=FORMAT, limit=MIB).sha256
    for name, digest in promised.items():
        path = folder / name
        if not path.is_file():
            if name in optional:
                continue
            raise UserError(f"{path} is missing from the checkpoint")
        if sha256(path) != digest:
            raise UserError(f"{path} is damaged or was changed: its sha256 is not the one in {MANIFEST}")
