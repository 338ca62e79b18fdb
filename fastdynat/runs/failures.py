"""Failed writes in one line: the file, the reason, and the bytes that there is no room for."""

import errno
import os
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastdynat.documents import check_text
from fastdynat.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)


class WriteError(UserError):
    """A file that this process cannot write.

    Attributes:
        path: the file.
        reason: the system's words; for a lack of room also the bytes needed and free.
    """

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"cannot write {path}: {reason}")


def _missing(path: Path, error: OSError) -> str:
    """The folder to make first, where its absence is the reason."""
    folder = Path(os.path.realpath(path)).parent
    return f"; make the folder {folder} first" if error.errno == errno.ENOENT and not folder.exists() else ""


def _room(path: Path, error: OSError, needed: int) -> str:
    """The bytes needed and free, where a lack of room is the reason."""
    if error.errno == errno.EFBIG:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        there_is = "" if limit == resource.RLIM_INFINITY else f"a file may have {limit:,} bytes (ulimit -f)"
    elif error.errno in FULL:
        there_is = f"{free_bytes(path):,} bytes are free"
    else:
        return ""
    return "".join(
        f"; {part}" for part in (f"{needed:,} bytes are needed" if needed else "", there_is) if part
    )


def free_bytes(path: Path) -> int:
    """Free bytes of the file system of `path`, which need not exist."""
    place = Path(os.path.realpath(path))
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def system_error(error: BaseException) -> OSError | None:
    """The OSError that `error` is, or quotes as safetensors does; None for other errors."""
    if isinstance(error, OSError):
        return error
    match = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(match[1]), os.strerror(int(match[1]))) if match else None


@contextmanager
def explained(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn a system error inside the block into a WriteError about `path`.

    needed: bytes that the file would have, if known.

    Raises:
        WriteError: the system refused.
        UserError: no file can have the name `path`.
    """
    check_text(str(path), "cannot write: the path")
    try:
        yield
    except UserError:
        raise
    except RecursionError:  # makedirs calls itself for every part
        raise WriteError(path, "its name has too many parts") from None
    except Exception as error:
        found = system_error(error)
        if found is not None:
            raise WriteError(
                path, f"{found.strerror or found}{_missing(path, found)}{_room(path, found, needed)}"
            ) from None
        raise


@contextmanager
def explained_reading(path: Path) -> Iterator[None]:
    """Turn a system error inside the block into a UserError about reading `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
