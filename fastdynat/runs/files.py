"""Files that are whole or absent: a kill at any moment leaves the old content or the new one."""

import importlib.util
import os
from pathlib import Path

from fastdynat.errors import UserError

PICTURES = (".svg", ".png", ".pdf")


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make the content of `path` survive a power loss."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def check_writable(path: Path) -> None:
    """Raise UserError unless a file can be written at `path`; leaves nothing behind."""
    try:
        existed = path.exists()
        with path.open("a"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def check_output(flag: str, path: str | None, suffixes: tuple[str, ...]) -> None:
    """Raise UserError unless `path` ends in one of `suffixes`, and can be drawn where it is a picture; None is no file."""
    if path is None:
        return
    suffix = Path(path).suffix
    if suffix not in suffixes:
        raise UserError(f"--{flag} must end in {', '.join(suffixes)}, got {path!r}")
    if suffix in PICTURES and importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"--{flag} {path} needs matplotlib: pip install 'fastdynat[plots]'")


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def point(link: Path, target: str) -> None:
    """Make the symbolic link `link` point at `target` (relative to its folder) in one step."""
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)
