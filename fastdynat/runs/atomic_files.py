"""Files that are whole or absent: a kill at any moment leaves the old content or the new one.

A path is what it names: a symbolic link is followed and its target replaced; a pipe or a device, which cannot
be replaced, is written into.
"""

import errno
import fcntl
import os
import re
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from fastdynat.documents import open_file
from fastdynat.errors import UserError
from fastdynat.runs.failures import WriteError, explained
from fastdynat.runs.layout import run_of_file

TEMPORARY = re.compile(r"\.fastdynat-[0-9a-f]{12}(\..{1,16})?")
BINARY = {".png": b"\x89PNG", ".pdf": b"%PDF"}  # results that are no text, by their first bytes
SOURCES = (".py", ".yaml", ".yml", ".toml", ".csv", ".jsonl")  # what nobody calls results
STALE_SECONDS = 60.0
READER_SECONDS, SILENT_SECONDS = (
    10.0,
    0.5,
)  # that a pipe is given to be opened at its other end; until that is said


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
    """Raise UserError unless a file can be written at `path`; what is there stays untouched, and nothing is
    left behind.
    """
    with explained(path):
        real = replaced(path)
        if real is None:
            if _own_descriptor(path) is None and not os.access(path, os.W_OK):
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))
            return
        if real.exists():
            if not os.access(real, os.W_OK):
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))
            if not os.access(real.parent, os.W_OK | os.X_OK):
                return  # it will be written in place
        descriptor, temporary = _temporary(real)
        os.close(descriptor)
        temporary.unlink()


def check_output(path: Path) -> None:
    """`check_writable` for a place that the user names: a file that belongs to a run is refused too."""
    check_writable(path)
    if (run := run_of_file(path)) is not None:
        raise UserError(f"{path} is a file of the run {run}, which it would destroy: choose another place")


def check_results(
    texts: Iterable[str | None] = (),
    pictures: Iterable[str | None] = (),
    *,
    inputs: Iterable[str | Path | None] = (),
) -> None:
    """`check_output` for the files that one command writes its results into, None for those that were not
    asked for.

    Args:
        texts, pictures: where text (JSON) goes, and what its ending says (`BINARY`, else text too).
        inputs: files that the command reads.

    Raises:
        UserError: also where two are one file, where one is among `inputs`, and where what is
            there cannot be results: it is binary, or of another kind than its ending says.
    """
    read = {os.path.realpath(path) for path in inputs if path is not None}
    written: set[str] = set()
    drawn = {Path(path) for path in pictures if path}
    for path in (*map(Path, filter(None, texts)), *map(Path, filter(None, pictures))):
        check_output(path)
        if not is_replaced(path):
            continue
        place = os.path.realpath(path)
        if place in read:
            raise UserError(
                f"{path} is an input of this command, which would overwrite it: choose another place"
            )
        if place in written:
            raise UserError(f"{path} is given for two results: choose another place for one of them")
        if os.path.exists(place) and not _may_be_results(Path(place), path in drawn):
            raise UserError(f"{path} exists and does not hold results: choose another place, or move it away")
        written.add(place)


def _may_be_results(file: Path, is_picture: bool) -> bool:
    """Whether `file` is what a command may have written as results, or empty."""
    with open_file(file) as opened:
        start = opened.read(4096)
    if start and file.suffix.lower() in SOURCES:
        return False
    if is_picture and (magic := BINARY.get(file.suffix.lower())) is not None:
        return not start or start.startswith(magic)
    return b"\0" not in start and not start.startswith(tuple(BINARY.values()))


def replaced(path: Path) -> Path | None:
    """The regular file that writing `path` replaces or makes, links followed; None for a pipe or a device,
    which stays.

    Raises:
        OSError: a folder, a disk, or a path that leads nowhere.
    """
    if _own_descriptor(path) is not None:
        return None
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return Path(os.path.realpath(path))
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    if stat.S_ISBLK(mode):
        raise OSError(errno.EPERM, "it is a disk, not a file")
    return Path(os.path.realpath(path)) if stat.S_ISREG(mode) else None


def is_replaced(path: Path) -> bool:
    """Whether writing `path` replaces a file, so that it can be done again and again."""
    with explained(path):
        return replaced(path) is not None


def make_folder(path: Path) -> None:
    """Make the folder `path` and its parents where they are missing. Raises WriteError."""
    with explained(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None


def _own_descriptor(path: Path) -> int | None:
    """N where `path` is, or is a link to, descriptor N of this process, as /dev/stdout and /dev/fd/N are;
    else None.
    """
    own = re.compile(rf"/proc/(?:self|{os.getpid()})/fd/(\d+)")
    for _ in range(40):  # links, at most as many as Linux follows
        path = Path(os.path.realpath(path.parent), path.name)
        if match := own.fullmatch(str(path)):
            return int(match[1])
        if not path.is_symlink():
            return None
        path = path.parent / path.readlink()
    return None


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step. Raises WriteError."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step; the new file has the mode of the old one, or what the umask
    leaves.

    Raises:
        WriteError: the system refused, for want of room or of a right; what was there is still there.
    """
    with explained(path, len(data)):
        real = replaced(path)
        if real is None:
            _write_into(path, data)
        elif real.exists() and not os.access(real.parent, os.W_OK | os.X_OK):
            real.write_bytes(data)  # no other file can be made beside it
        else:
            _replace(real, data)


def _replace(real: Path, data: bytes) -> None:
    descriptor, temporary = _temporary(real)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            _take_place(temporary, real)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _take_place(temporary: Path, real: Path) -> None:
    """Rename `temporary` to `real`; where only its content may change (another's file, a mount), change
    that.
    """
    try:
        temporary.replace(real)
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.EPERM, errno.EACCES) or not real.is_file():
            raise
        real.write_bytes(temporary.read_bytes())
        temporary.unlink()


def _write_into(path: Path, data: bytes) -> None:
    """Write to the pipe, device or descriptor `path`."""
    number = _own_descriptor(path)
    if number is None:
        descriptor = _open_pipe(path)
        os.set_blocking(descriptor, True)
    else:
        sys.stdout.flush()
        descriptor = os.dup(number)
    with open(descriptor, "wb") as file:
        file.write(data)


def _open_pipe(path: Path) -> int:
    """Open a pipe or device for writing; wait for a pipe's reader, but not for ever, and not without a
    word.
    """
    begin, said = time.monotonic(), False
    while True:
        try:
            return os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
        waited = time.monotonic() - begin
        if waited > READER_SECONDS:
            raise WriteError(path, "nothing reads this pipe; start its reader first")
        if waited > SILENT_SECONDS and not said:
            said = True
            print(
                f"fastdynat: note: {path} is a pipe that nothing reads; waiting {READER_SECONDS:g} s",
                file=sys.stderr,
            )
        time.sleep(0.05)


def _temporary(real: Path) -> tuple[int, Path]:
    """An open empty file beside `real`, locked as long as it is open, with the mode and owner of `real` where
    that is there.
    """
    suffix = real.suffix if len(real.suffix) <= 16 else ""
    path = real.with_name(f".fastdynat-{os.urandom(6).hex()}{suffix}")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    with suppress(OSError):  # file systems without locks, owners or modes
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        old, new = real.stat(), os.fstat(descriptor)
        if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
            os.fchown(descriptor, old.st_uid, old.st_gid)
        os.fchmod(descriptor, stat.S_IMODE(old.st_mode))
    return descriptor, path


def drop_leftovers(folder: Path) -> None:
    """Remove temporary files of this module in `folder` whose process was killed."""
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


@contextmanager
def replacing(path: Path, *, needed: int = 0) -> Iterator[Path]:
    """A file beside `path`, with its suffix, which takes the place of `path` if the block ends without an
    error.

    needed: bytes that it will have, if that is known.

    Raises:
        WriteError: the system refused, here or inside the block; what was there is still there.
    """
    with explained(path, needed):
        real = replaced(path)
        if real is None or (real.exists() and not os.access(real.parent, os.W_OK | os.X_OK)):
            with tempfile.TemporaryDirectory() as folder:
                temporary = Path(folder, f"new{path.suffix}")
                yield temporary
                write_bytes(path, temporary.read_bytes())
            return
        descriptor, temporary = _temporary(real)
        try:
            yield temporary
            mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
            sync_file(temporary)
            temporary.chmod(mode)  # the block may have made another file in its place
            _take_place(temporary, real)
        except WriteError as error:
            raise WriteError(path, error.reason) if error.path == temporary else error from None
        finally:
            temporary.unlink(missing_ok=True)
            os.close(descriptor)


class Sink:
    """A binary file that never fails: what goes wrong is kept in `error`, because torch's writer aborts the
    process instead.
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
        """Nothing: the file is flushed when it is closed."""


@contextmanager
def saving(path: Path, *, needed: int = 0) -> Iterator[Any]:
    """`replacing` for `torch.save`: something to write into, not a name. Raises WriteError."""
    with replacing(path, needed=needed) as temporary, explained(path, needed), temporary.open("wb") as file:
        sink = Sink(file)
        yield sink
        if sink.error is not None:
            raise sink.error


def point(link: Path, target: str) -> None:
    """Make the symbolic link `link` point at `target` (relative to its folder) in one step."""
    temporary = link.with_name(f".fastdynat-{os.urandom(6).hex()}")
    temporary.symlink_to(target)
    try:
        temporary.replace(link)
    except OSError:
        temporary.unlink()
        raise
