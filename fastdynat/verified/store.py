"""Verdicts kept from one process to the next, and the marks by which a check that ended its process is recognised."""

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastdynat.documents import DocumentError, parse_json, read_text
from fastdynat.machine import folder, processor, replace_text, versions
from fastdynat.verified.check import Check, Verdict

FORMAT = "fastdynat-verified/1"
LIMIT = 1 << 18
log = logging.getLogger("fastdynat.verified")
_said = False


@dataclass(frozen=True)
class Stored:
    """What a file holds. `fastest`: by size, seconds of a call by implementation."""

    key: dict[str, Any]
    verdicts: dict[str, Verdict]
    fastest: dict[str, dict[str, float]] = field(default_factory=dict)


def key_of(check: Check, device: torch.device) -> dict[str, Any]:
    """Everything that the verdicts on `check` depend on; plain values."""
    sources = {}
    for path in check.sources:
        with suppress(OSError):
            about = path.stat()
            sources[f"{path.parent.name}/{path.name}"] = [about.st_size, about.st_mtime_ns]
    found = {"check": check.name, "device": device.type, "processor": processor(device), "sources": sources}
    return found | {"versions": versions(device)}


def _path(key: Mapping[str, Any]) -> Path | None:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
    return None if (base := folder("verified")) is None else base / f"{key['check']}-{digest}.json"


def load(key: Mapping[str, Any]) -> Stored:
    """What was stored under `key`; nothing where the file is missing, damaged or of something else."""
    nothing = Stored(dict(key), {})
    path = _path(key)
    with suppress(DocumentError, OSError):
        if path is not None and path.is_file():
            text = read_text(path, limit=LIMIT)
            found = parse_json(text, Stored, origin=str(path), what="a list of verdicts", format=FORMAT)
            return found if found.key == json.loads(json.dumps(key)) else nothing
    return nothing


def writable() -> bool:
    """Whether verdicts can be kept, as far as that can be known without writing one."""
    base = folder("verified")
    with suppress(OSError):
        if base is not None:
            base.mkdir(parents=True, exist_ok=True)
            return os.access(base, os.W_OK | os.X_OK)
    return False


def save(stored: Stored) -> bool:
    """Keep `stored`. False, and a word at the first time, where that is impossible."""
    path = _path(stored.key)
    try:
        if path is None:
            raise OSError("there is no home folder")
        replace_text(path, json.dumps({"format": FORMAT, **asdict(stored)}, indent=1) + "\n")
    except OSError as error:
        _say_once(error.strerror or str(error), path)
        return False
    return True


def _say_once(why: str, path: Path | None) -> None:
    global _said
    if not _said:
        _said = True
        place = "anywhere" if path is None else f"in {path.parent}"
        log.warning("operators are checked anew at every start: verdicts cannot be kept %s (%s)", place, why)


@contextmanager
def mark(key: Mapping[str, Any], candidate: str) -> Iterator[tuple[str | None, Callable[[str], None]]]:
    """Leave a mark for as long as `candidate` is being checked, which outlives this process where the check ends it.

    Yields the case at which an earlier process ended so (None: no such mark) and a function that writes the case into ours.
    A mark that its process still holds says nothing.
    """
    path = _path(key)
    if path is None:
        yield None, _write_nothing
        return
    path = path.with_name(f"{path.stem}-{candidate}.checking")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        yield None, _write_nothing
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another process checks the same right now
        os.close(handle)
        yield None, _write_nothing
        return
    try:
        left = os.pread(handle, 1000, 0).decode("utf-8", "replace").strip()

        def note(case: str) -> None:
            with suppress(OSError):
                os.truncate(handle, os.pwrite(handle, case.encode()[:999], 0))

        yield left or None, note
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(handle)


def _write_nothing(case: str) -> None:
    pass
