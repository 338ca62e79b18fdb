"""Measurements kept from one process to the next, in the user's cache folder. Whatever is wrong with it,
nothing fails.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastdynat.machine import replace_text, user_cache

FORMAT = "fastdynat-measured/1"
MAX_BYTES = 1 << 16


def measurements_folder() -> Path | None:
    """Where the measurements are; None where there is no home."""
    return user_cache("measured")


def _path(key: Mapping[str, Any]) -> Path | None:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
    return None if (base := measurements_folder()) is None else base / f"{digest}.json"


def load_seconds(key: Mapping[str, Any], names: set[str]) -> dict[str, float] | None:
    """The seconds of `names` that were measured under `key`; None where there are none, or none that can be
    believed.
    """
    path = _path(key)
    try:
        if path is None or not path.is_file() or path.stat().st_size > MAX_BYTES:
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if (
        not isinstance(found, dict)
        or found.get("format") != FORMAT
        or found.get("key") != json.loads(json.dumps(key))
    ):
        return None
    seconds = found.get("seconds")
    if not isinstance(seconds, dict) or set(seconds) != names:
        return None
    ok = all(isinstance(t, float) and math.isfinite(t) and t > 0 for t in seconds.values())
    return seconds if ok else None


def save_seconds(key: Mapping[str, Any], seconds: Mapping[str, float]) -> None:
    """Keep `seconds` under `key`, for whoever measures next; without a word where that is impossible."""
    path = _path(key)
    if path is None:
        return
    text = json.dumps({"format": FORMAT, "key": key, "seconds": dict(seconds)}, indent=1) + "\n"
    with suppress(OSError):
        replace_text(path, text)
