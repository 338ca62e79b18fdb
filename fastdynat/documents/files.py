"""Bytes and text of files that a user can change: no folders, no endless pipes, no more than a limit."""

import os
import select
import stat
from io import BufferedReader
from pathlib import Path

from fastdynat.errors import UserError, not_a_name

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PATIENCE = 10.0  # seconds that a pipe may be silent


class DocumentError(UserError):
    """A file or text that cannot be used: missing, damaged, or another kind of document."""


def short_repr(value: object, length: int = 60) -> str:
    """``repr(value)`` for a message, cut to `length` characters.

    >>> short_repr("x" * 100, 10)
    "'xxxxx ..."
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of over 4,300 digits, a list that contains itself
        text = f"a {type(value).__name__}"
    return text if len(text) <= length else f"{text[: length - 4]} ..."


def check_text(text: str, what: str) -> str:
    """Return `text` if it can be a name or a path.

    Raises:
        DocumentError: it has a NUL character, or a surrogate that stands for no byte of a path.
    """
    if (reason := not_a_name(text)) is not None:
        raise DocumentError(f"{what} {reason}: {short_repr(text)}")
    return text


def regular_file(path: Path, *, remedy: str = "") -> int:
    """The size in bytes of the file at `path`, for libraries that open it themselves.

    Raises:
        DocumentError: it is missing, may not be read, or is a folder, a pipe or a device.
    """
    descriptor, size = _open(path, remedy, stream=False)
    os.close(descriptor)
    assert size is not None
    return size


def open_file(path: Path, *, remedy: str = "") -> BufferedReader:
    """The file at `path`, open for reading, without waiting. Raises DocumentError as `regular_file` does."""
    descriptor, _ = _open(path, remedy, stream=False)
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, *, limit: int, remedy: str = "", stream: bool = False) -> bytes:
    """All bytes of the file at `path`.

    Args:
        limit: the most bytes that a good file has.
        remedy: the advice in the message where it cannot be read.
        stream: take a pipe too, such as ``/dev/stdin`` or the shell's ``<(command)``.

    Raises:
        DocumentError: it cannot be read, is a folder or a device, or has more than `limit` bytes; a pipe was
            silent for 10 seconds.
    """
    descriptor, size = _open(path, remedy, stream=stream)
    try:
        if size is not None and size > limit:
            raise _too_long(path, limit, remedy)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        data = bytearray()
        while len(data) <= limit:
            # A regular file is always ready.
            if not poll.poll(1000 * PATIENCE):
                raise DocumentError(
                    _and(f"{path}: nothing came through this pipe for {PATIENCE:g} seconds", remedy)
                )
            chunk = os.read(descriptor, min(MIB, limit + 1 - len(data)))
            if not chunk:
                return bytes(data)
            data += chunk
        raise _too_long(path, limit, remedy)
    except OSError as error:
        raise _cannot(path, error, remedy) from None
    finally:
        os.close(descriptor)


def read_text(path: Path, *, limit: int, remedy: str = "", stream: bool = False) -> str:
    """`read_bytes` decoded as UTF-8, byte order mark allowed. Raises DocumentError for other encodings."""
    try:
        return read_bytes(path, limit=limit, remedy=remedy, stream=stream).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DocumentError(
            _and(f"{path} is not a text file in UTF-8 (byte {error.start})", remedy)
        ) from None


def _open(path: Path, remedy: str, *, stream: bool) -> tuple[int, int | None]:
    """A descriptor of `path` and its size, None for a pipe. Never waits, not even for a pipe's writer."""
    check_text(str(path), "the path")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _cannot(path, error, remedy) from None
    about = os.fstat(descriptor)
    if stat.S_ISREG(about.st_mode):
        return descriptor, about.st_size
    if stream and not stat.S_ISDIR(about.st_mode):
        return descriptor, None
    os.close(descriptor)
    kind = "folder" if stat.S_ISDIR(about.st_mode) else "pipe" if stat.S_ISFIFO(about.st_mode) else "device"
    raise DocumentError(_and(f"cannot read {path}: it is a {kind}, not a file", remedy))


def _cannot(path: Path, error: OSError, remedy: str) -> DocumentError:
    return DocumentError(_and(f"cannot read {path}: {error.strerror}", remedy))


def _too_long(path: Path, limit: int, remedy: str) -> DocumentError:
    size = f"{limit // MIB} MiB" if limit >= MIB else f"{limit // KIB} KiB"
    return DocumentError(
        _and(f"{path} has more than {size}, which no such file needs: it is something else", remedy)
    )


def _and(text: str, remedy: str) -> str:
    return f"{text}; {remedy}" if remedy else text
