"""Places that a path can be written to: a regular file that is replaced, or a pipe, device or descriptor.

A symbolic link is followed and its target replaced; a pipe or a device, which cannot be replaced, is written
into.
"""

import errno
import os
import re
import stat
import sys
import time
from pathlib import Path

from fastdynat.runs.failures import WriteError, explained

READER_SECONDS = 10.0  # a pipe's reader has this long to open it
SILENT_SECONDS = 0.5  # after this, a note says what is waited for
MAX_LINKS = 40  # as many as Linux follows


def target_file(path: Path) -> Path | None:
    """The regular file that writing `path` makes or replaces, links followed; None for a pipe or a device.

    Raises:
        OSError: a folder, a disk, or a path that leads nowhere.
    """
    if own_descriptor(path) is not None:
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


def is_file_target(path: Path) -> bool:
    """True if writing `path` replaces a file, so that it can be written again and again."""
    with explained(path):
        return target_file(path) is not None


def in_locked_folder(file: Path) -> bool:
    """True if no other file can be made beside `file`, so that only its content may change."""
    return not os.access(file.parent, os.W_OK | os.X_OK)


def own_descriptor(path: Path) -> int | None:
    """N for a path that is, or links to, descriptor N of this process (/dev/stdout, /dev/fd/N); else None."""
    own = re.compile(rf"/proc/(?:self|{os.getpid()})/fd/(\d+)")
    for _ in range(MAX_LINKS):
        path = Path(os.path.realpath(path.parent), path.name)
        if match := own.fullmatch(str(path)):
            return int(match[1])
        if not path.is_symlink():
            return None
        path = path.parent / path.readlink()
    return None


def write_into(path: Path, data: bytes) -> None:
    """Write `data` to the pipe, device or descriptor `path`."""
    number = own_descriptor(path)
    if number is None:
        descriptor = _open_pipe(path)
        os.set_blocking(descriptor, True)
    else:
        sys.stdout.flush()
        descriptor = os.dup(number)
    with open(descriptor, "wb") as file:
        file.write(data)


def _open_pipe(path: Path) -> int:
    """A pipe or device opened for writing; a pipe waits for its reader, with a note and a limit."""
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
            note = f"fastdynat: note: {path} is a pipe that nothing reads; waiting {READER_SECONDS:g} s"
            print(note, file=sys.stderr)
        time.sleep(0.05)
