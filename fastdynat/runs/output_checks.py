"""Checks of the files that a command will write, before it computes anything."""

import errno
import os
from collections.abc import Iterable
from pathlib import Path

from fastdynat.documents import open_file
from fastdynat.errors import UserError
from fastdynat.runs.atomic_files import temporary_beside
from fastdynat.runs.failures import explained
from fastdynat.runs.layout import run_of_file
from fastdynat.runs.write_targets import in_locked_folder, is_file_target, own_descriptor, target_file

MAGIC = {".png": b"\x89PNG", ".pdf": b"%PDF"}  # first bytes of results that are not text
SOURCES = (".py", ".yaml", ".yml", ".toml", ".csv", ".jsonl")  # names that no result has


def check_writable(path: Path) -> None:
    """Raise UserError unless a file can be written at `path`; nothing is changed or left behind."""
    with explained(path):
        file = target_file(path)
        if file is None:
            if own_descriptor(path) is None:
                _require_access(path)
            return
        if file.exists():
            _require_access(file)
            if in_locked_folder(file):
                return  # it will be written in place
        descriptor, temporary = temporary_beside(file)
        os.close(descriptor)
        temporary.unlink()


def _require_access(path: Path) -> None:
    if not os.access(path, os.W_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))


def check_output(path: Path) -> None:
    """`check_writable` for a path that the user names; also refuses a file that belongs to a run."""
    check_writable(path)
    if (run := run_of_file(path)) is not None:
        raise UserError(f"{path} is a file of the run {run} and must not be replaced: choose another place")


def check_results(
    texts: Iterable[str | None] = (),
    pictures: Iterable[str | None] = (),
    *,
    inputs: Iterable[str | Path | None] = (),
) -> None:
    """`check_output` for all files of one command's results; None is a file that was not requested.

    Args:
        texts: text files (JSON).
        pictures: PNG or PDF by their ending, else text too.
        inputs: files that the command reads.

    Raises:
        UserError: also for two results in one file, for a result in the place of an input, and for a file
            that cannot be an earlier result: it is binary, or of another kind than its ending says.
    """
    read = {os.path.realpath(path) for path in inputs if path is not None}
    written: set[str] = set()
    drawn = {Path(path) for path in pictures if path}
    for path in (*map(Path, filter(None, texts)), *map(Path, filter(None, pictures))):
        check_output(path)
        if not is_file_target(path):
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
    """True if a command may have written `file` as results, or it is empty."""
    with open_file(file) as opened:
        start = opened.read(4096)
    if start and file.suffix.lower() in SOURCES:
        return False
    if is_picture and (magic := MAGIC.get(file.suffix.lower())) is not None:
        return not start or start.startswith(magic)
    return b"\0" not in start and not start.startswith(tuple(MAGIC.values()))
