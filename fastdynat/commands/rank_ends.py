"""The end of a command on several processes: one rank prints the reason, and all ranks end."""

import json
import os
import sys
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from typing import Any

from fastdynat.errors import ToldElsewhere
from fastdynat.launch import launched, launched_rank, place_of

STORE_SECONDS = 5.0  # to reach the launcher's store before the world exists
FIRST_SECONDS = 3.0  # for rank 0 to find the same error, which it then reports


def report_end(error: BaseException, text: str, code: int, *, kind: str = "fastdynat: error: ") -> None:
    """Print the reason that this process ends, unless another rank has printed one.

    The other ranks receive it and end, too; `text` is written to torchrun's error file.

    Args:
        code: the exit code.
        kind: prefix of the printed line.
    """
    if not launched():
        _say(kind + text)
        return
    if isinstance(error, ToldElsewhere):
        return
    rank = launched_rank()
    text = text if rank == 0 or text.startswith("rank ") else f"{place_of(rank)}: {text}"
    if _report(text, code, kind + text):
        write_error_file(text, code)


def report_crash(error: Exception) -> None:
    """Print the traceback of an unexpected `error` with the rank, and report it to the other ranks."""
    text, place = "".join(traceback.format_exception(error)), place_of(launched_rank())
    shown = "\n".join(f"{place}: {line}" for line in text.splitlines())
    if not _report(f"{place}: {type(error).__name__}: {error}", 1, shown):
        _say(shown)
    write_error_file(text, 1)


def lost_rank(error: BaseException) -> str | None:
    """A message that names the rank whose end caused `error` here; None if no rank did."""
    if not launched():
        return None
    from fastdynat.distributed import present_session

    session = present_session()
    return None if session is None else session.lost(error)


def write_error_file(text: str, code: int) -> None:
    """Write the error file that torchrun's summary quotes."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        about = {"py_callstack": text, "timestamp": str(int(time.time()))}
        message = {"message": text, "errorCode": code, "extraInfo": about}
        with suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": message}, file)


def _report(text: str, code: int, shown: str) -> bool:
    """Report to the other ranks; print `shown` and return True if this rank is the first to report."""
    from fastdynat.distributed import present_session

    session = present_session()
    if session is not None:
        return session.report(text, code, shown)
    first = _told_before_joining(launched_rank(), text, code)
    if first:
        _say(shown)
    return first


def _say(text: str) -> None:
    with suppress(OSError):  # the terminal may be gone
        print(text, file=sys.stderr, flush=True)


def _told_before_joining(rank: int, text: str, code: int) -> bool:
    """Report to the other ranks before the world exists; True if this rank is the first."""
    from fastdynat.distributed.session import FAILURE
    from fastdynat.distributed.store import open_store

    try:
        store: Any = open_store(rank, timedelta(seconds=STORE_SECONDS))
        until = time.monotonic() + (FIRST_SECONDS if rank else 0)
        while time.monotonic() < until and not store.check([FAILURE]):
            time.sleep(0.05)
        value = json.dumps({"rank": rank, "text": text, "code": code})
        return bool(store.compare_set(FAILURE, "", value) == value.encode())
    except (RuntimeError, ValueError):  # no store, so nobody else can report
        return True
