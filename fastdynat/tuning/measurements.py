"""Files of timings in the user's cache folder. An unusable folder or file is never an error."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdynat.documents import DocumentError, read_json, through_json
from fastdynat.documents.numbers import AboveZero
from fastdynat.machine import replace_text, user_cache

FORMAT = "fastdynat-measured/1"
MAX_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """The document in the file."""

    key: dict[str, Any]
    seconds: dict[str, AboveZero]


def measurements_folder() -> Path | None:
    """The folder of the measurements; None without a home folder."""
    return user_cache("measured")


def _path(key: Mapping[str, Any]) -> Path | None:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
    return None if (base := measurements_folder()) is None else base / f"{digest}.json"


def load_seconds(key: Mapping[str, Any], names: set[str]) -> dict[str, float] | None:
    """The stored seconds of `names` under `key`; None if there are none, or the file is damaged."""
    path = _path(key)
    with suppress(DocumentError, OSError):
        if path is not None and path.is_file():
            found = read_json(path, _Stored, what="a measurement", format=FORMAT, limit=MAX_BYTES)
            if found.key == through_json(key) and found.seconds.keys() == names:
                return found.seconds
    return None


def save_seconds(key: Mapping[str, Any], seconds: Mapping[str, float]) -> None:
    """Store `seconds` under `key`; silently does nothing if that fails."""
    path = _path(key)
    if path is None:
        return
    text = json.dumps({"format": FORMAT, "key": key, "seconds": dict(seconds)}, indent=1) + "\n"
    with suppress(OSError):
        replace_text(path, text)
