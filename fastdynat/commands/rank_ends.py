"""The end of a command of several processes: one reports, the others are silent, none stays behind."""

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

STORE_SECONDS = 5.0  # to reach the launcher's store before the ranks have joined
FIRST_SECONDS = 3.0  # for rank 0 to find the same error, which it then reports


def report_end(error: BaseException, text: str, code: int, *, kind: str = "fastdynat: error: ") -> None:
    """Print why this process ends, unless another rank of its world says why all end.

    The other ranks are told, so that they end, too; torchrun finds `text` in its error file.

    Args:
        code: the exit code.
        kind: what is printed before `text`.
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
    """Print the traceback of an unexpected `error`, with the rank; the other ranks are told."""
    text, place = "".join(traceback.format_exception(error)), place_of(launched_rank())
    shown = "\n".join(f"{place}: {line}" for line in text.splitlines())
    if not _report(f"{place}: {type(error).__name__}: {error}", 1, shown):
        _say(shown)
    write_error_file(text, 1)


def lost_rank(error: BaseException) -> str | None:
    """The rank whose end caused `error` here, in words; None where there is none."""
    if not launched():
        return None
    from fastdynat.distributed import present_session

    session = present_session()
    return None if session is None else session.lost(error)


def write_error_file(text: str, code: int) -> None:
    """Write the file from which torchrun's summary takes the reason."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        about = {"py_callstack": text, "timestamp": str(int(time.time()))}
        message = {"message": text, "errorCode": code, "extraInfo": about}
        with suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": message}, file)


def _report(text: str, code: int, shown: str) -> bool:
    """Print `shown` and tell the other ranks, unless one of them was first; returns whether this one was."""
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
    """Tell the other ranks; returns whether this one is the first."""
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
