"""Files of verdicts and timings in the user's cache folder."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastdynat.documents import DocumentError, parse_json, read_text, through_json
from fastdynat.machine import processor, replace_text, user_cache, versions
from fastdynat.verification.operator_check import CandidateVerdict, OperatorCheck

FORMAT = "fastdynat-verified/1"
LIMIT = 1 << 18
log = logging.getLogger("fastdynat.verification")
_said = False


@dataclass(frozen=True)
class Stored:
    """The content of a file. `fastest`: seconds of a call by size and implementation."""

    key: dict[str, Any]
    verdicts: dict[str, CandidateVerdict]
    fastest: dict[str, dict[str, float]] = field(default_factory=dict)


def key_of(check: OperatorCheck, device: torch.device) -> dict[str, Any]:
    """Everything that the verdicts on `check` depend on, as plain values."""
    sources = {}
    for path in check.sources:
        with suppress(OSError):
            about = path.stat()
            sources[f"{path.parent.name}/{path.name}"] = [about.st_size, about.st_mtime_ns]
    found = {"check": check.name, "device": device.type, "processor": processor(device), "sources": sources}
    return found | {"versions": versions(device)}


def path_of(key: Mapping[str, Any]) -> Path | None:
    """The file for `key`; None without a home folder."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
    return None if (base := user_cache("verified")) is None else base / f"{key['check']}-{digest}.json"


def load_verdicts(key: Mapping[str, Any]) -> Stored:
    """Load the file for `key`; an empty result if it is missing, damaged or has another key."""
    nothing = Stored(dict(key), {})
    path = path_of(key)
    with suppress(DocumentError, OSError):
        if path is not None and path.is_file():
            text = read_text(path, limit=LIMIT)
            found = parse_json(text, Stored, origin=str(path), what="a list of verdicts", format=FORMAT)
            return found if found.key == through_json(key) else nothing
    return nothing


def writable() -> bool:
    """True if verdicts can probably be stored; writes none."""
    base = user_cache("verified")
    with suppress(OSError):
        if base is not None:
            base.mkdir(parents=True, exist_ok=True)
            return os.access(base, os.W_OK | os.X_OK)
    return False


def save_verdicts(stored: Stored) -> bool:
    """Store `stored`. If that fails, return False and log it once."""
    path = path_of(stored.key)
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
