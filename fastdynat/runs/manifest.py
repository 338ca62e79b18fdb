"""The manifest of a checkpoint folder: which files belong together, byte for byte."""

import hashlib
import json
from pathlib import Path

from fastdynat.errors import UserError
from fastdynat.runs.files import write_text

MANIFEST = "checkpoint.json"
FORMAT = "fastdynat-checkpoint/1"


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
    try:
        about = json.loads(manifest.read_text(encoding="utf-8"))
        promised = dict(about["sha256"]) if about["format"] == FORMAT else None
    except FileNotFoundError:
        raise UserError(f"{folder} is not a fastdynat checkpoint: it has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError):
        promised = None
    if promised is None:
        raise UserError(f"{manifest} is truncated or not a fastdynat manifest")
    for name, digest in promised.items():
        path = folder / name
        if not path.is_file():
            if name in optional:
                continue
            raise UserError(f"{path} is missing from the checkpoint")
        if sha256(path) != digest:
            raise UserError(f"{path} is damaged or was changed: its sha256 is not the one in {MANIFEST}")
