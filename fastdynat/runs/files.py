"""Files that are whole or absent: a kill at any moment leaves the old content or the new one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastdynat.errors import UserError


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


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path`, with its suffix, for a file that takes the place of `path` if the block ends without an error."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        yield temporary
        sync_file(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def point(link: Path, target: str) -> None:
    """Make the symbolic link `link` point at `target` (relative to its folder) in one step."""
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)
