"""The user's cache folder, and files that change as a whole."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path


def user_cache(name: str) -> Path | None:
    """XDG_CACHE_HOME/fastdynat/`name`, or under ~/.cache; None where there is no home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if base and Path(base).is_absolute():  # a relative one is to be ignored, says the specification
        return Path(base, "fastdynat", name)
    with suppress(RuntimeError):
        return Path.home() / ".cache" / "fastdynat" / name
    return None


def replace_text(path: Path, text: str) -> None:
    """Write `text` to `path`, making its folder; another process sees the old file or the new one. Raises
    OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)  # another process that wrote the same wins or loses as a whole
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
