"""Unpack the images of a pack: python3 -m gpu.unpack ARCHIVE FOLDER, beside other work."""

import os
import shutil
import sys
import tarfile
from pathlib import Path


def extract_data(archive: Path, target: Path) -> None:
    """Unpack train/ and test/ into `target`, which appears only when all is there."""
    temporary = target.with_name(target.name + ".new")
    shutil.rmtree(temporary, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(temporary, filter="data")
    inner = next((path.parent for path in sorted(temporary.glob("**/train")) if path.is_dir()), temporary)
    os.replace(inner, target)
    shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    extract_data(Path(sys.argv[1]), Path(sys.argv[2]))
