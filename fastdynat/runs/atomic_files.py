"""Files that are whole or absent: a kill at any moment leaves the old content or the new one."""

import errno
import fcntl
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from fastdynat.runs.failures import WriteError, explained
from fastdynat.runs.write_targets import in_locked_folder, target_file, write_into

TEMPORARY = re.compile(r"\.fastdynat-[0-9a-f]{12}(\..{1,16})?")
MAX_SUFFIX = 16  # characters of a name's ending that a temporary file keeps
STALE_SECONDS = 60.0


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step. Raises WriteError."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step, with the mode of the old file, or what the umask leaves.

    Raises:
        WriteError: the system refused, for want of room or of a right; the old content is still there.
    """
    with explained(path, len(data)):
        file = target_file(path)
        if file is None:
            write_into(path, data)
        elif file.exists() and in_locked_folder(file):
            file.write_bytes(data)
        else:
            _replace(file, data)


@contextmanager
def replacing(path: Path, *, needed: int = 0) -> Iterator[Path]:
    """A file beside `path`, with its suffix, which replaces `path` if the block ends without an error.

    needed: bytes that it will have, if that is known.

    Raises:
        WriteError: the system refused, here or inside the block; the old content is still there.
    """
    with explained(path, needed):
        target = target_file(path)
        if target is None or (target.exists() and in_locked_folder(target)):
            with tempfile.TemporaryDirectory() as folder:
                temporary = Path(folder, f"new{path.suffix}")
                yield temporary
                write_bytes(path, temporary.read_bytes())
            return
        descriptor, temporary = temporary_beside(target)
        try:
            yield temporary
            mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
            sync_file(temporary)
            temporary.chmod(mode)  # the block may have made another file in its place
            _take_place(temporary, target)
        except WriteError as error:
            raise WriteError(path, error.reason) if error.path == temporary else error from None
        finally:
            temporary.unlink(missing_ok=True)
            os.close(descriptor)


class Sink:
    """A binary file whose `write` never fails: torch's writer aborts the process where one does.

    Attributes:
        error: what went wrong first.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Do nothing: the file is flushed when it is closed."""


@contextmanager
def saving(path: Path, *, needed: int = 0) -> Iterator[Any]:
    """`replacing` for `torch.save`: a file object to write into. Raises WriteError."""
    with replacing(path, needed=needed) as temporary, explained(path, needed), temporary.open("wb") as file:
        sink = Sink(file)
        yield sink
        if sink.error is not None:
            raise sink.error


def make_folder(path: Path) -> None:
    """Make the folder `path` and its parents where they are missing. Raises WriteError."""
    with explained(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None


def replace_link(link: Path, target: str) -> None:
    """Make the symbolic link `link` point at `target` (relative to its folder) in one step."""
    temporary = link.with_name(f".fastdynat-{os.urandom(6).hex()}")
    temporary.symlink_to(target)
    try:
        temporary.replace(link)
    except OSError:
        temporary.unlink()
        raise


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


def temporary_beside(target: Path) -> tuple[int, Path]:
    """An empty file beside `target`, open and locked, with the mode and owner of `target` if that exists."""
    suffix = target.suffix if len(target.suffix) <= MAX_SUFFIX else ""
    path = target.with_name(f".fastdynat-{os.urandom(6).hex()}{suffix}")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    with suppress(OSError):  # file systems without locks, owners or modes
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        old, new = target.stat(), os.fstat(descriptor)
        if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
            os.fchown(descriptor, old.st_uid, old.st_gid)
        os.fchmod(descriptor, stat.S_IMODE(old.st_mode))
    return descriptor, path


def drop_leftovers(folder: Path) -> None:
    """Remove the temporary files in `folder` whose process was killed."""
    for path in folder.glob(".fastdynat-*"):
        about = path.lstat()
        if (
            not TEMPORARY.fullmatch(path.name)
            or not stat.S_ISREG(about.st_mode)
            or time.time() - about.st_mtime < STALE_SECONDS
        ):
            continue
        with suppress(OSError), path.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while it is being written
            path.unlink()


def _replace(target: Path, data: bytes) -> None:
    descriptor, temporary = temporary_beside(target)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            _take_place(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _take_place(temporary: Path, target: Path) -> None:
    """Rename `temporary` to `target`, or copy its content where only that may change (a mount)."""
    try:
        temporary.replace(target)
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.EPERM, errno.EACCES) or not target.is_file():
            raise
        target.write_bytes(temporary.read_bytes())
        temporary.unlink()
