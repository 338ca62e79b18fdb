"""The fastest correct implementation at a size, measured once and stored."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace

import torch

from fastdynat.machine import one_thread, race, race_on_gpu
from fastdynat.verification import verdict_store
from fastdynat.verification.captured_calls import captured_calls
from fastdynat.verification.judge import checking_lock
from fastdynat.verification.operator_check import registered

# Fraction of its time by which another candidate must beat the preferred one. On the CPU it is large, so that
# noise never decides: machines of one kind then choose alike and compute the same bits.
MARGIN = {"cpu": 0.5, "cuda": 0.1}
SECONDS, AGAIN = 0.02, 0.2  # of a race, and of the second race, which must confirm that another one won

_winners: dict[tuple[str, torch.device, str], str] = {}


def winner(name: str, device: torch.device, size: str) -> str | None:
    """The answer of `fastest` in this process; None if it was not asked."""
    return _winners.get((name, device, size))


def fastest(name: str, device: torch.device, size: str, calls: Mapping[str, Callable[[], object]]) -> str:
    """The fastest of `calls`, each of a correct implementation of check `name` on `device`.

    The first one is preferred: it wins unless it raises or another one is clearly faster (`MARGIN`). It also
    wins if the result cannot be stored, as another process might choose otherwise.

    size: the key of the measurement.
    """
    preferred = next(iter(calls))
    with checking_lock():
        if (found := _winners.get((name, device, size))) is not None:
            return found
        found = _measured(name, device, size, calls) or preferred
        _winners[name, device, size] = found
    return found


def _measured(
    name: str, device: torch.device, size: str, calls: Mapping[str, Callable[[], object]]
) -> str | None:
    key = verdict_store.key_of(registered()[name], device)
    before = verdict_store.load_verdicts(key)
    if not set(calls) <= set(before.fastest.get(size, {})):
        if not verdict_store.writable():
            return None
        seconds = _race(calls, device)
        stored = verdict_store.load_verdicts(
            key
        )  # with what others wrote meanwhile; the first to measure a size decides
        if not set(calls) <= set(stored.fastest.get(size, {})):
            stored = replace(stored, fastest=stored.fastest | {size: seconds})
            if not verdict_store.save_verdicts(stored):
                return None
        before = stored
    return best({candidate: before.fastest[size][candidate] for candidate in calls}, device)


def best(seconds: Mapping[str, float], device: torch.device) -> str:
    """The first name in `seconds`, or the fastest if it wins by `MARGIN`. Infinite: could not be timed."""
    preferred, quickest = next(iter(seconds)), min(seconds, key=lambda name: seconds[name])
    return (
        quickest if seconds[quickest] < (1 - MARGIN.get(device.type, 0.5)) * seconds[preferred] else preferred
    )


def _race(calls: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    usable = {}
    for name, call in calls.items():
        with suppress(RuntimeError):  # no memory for a second result, say
            call()
            usable[name] = call
    seconds = timed(usable, device, SECONDS)
    if seconds and best(seconds, device) != next(iter(seconds)):
        seconds = timed(usable, device, AGAIN)
    return {name: seconds.get(name, math.inf) for name in calls}


def timed(
    calls: Mapping[str, Callable[[], object]], device: torch.device, seconds: float
) -> dict[str, float]:
    """Seconds per call on `device`.

    On a GPU those of its kernels alone, as in a captured step: Python takes longer to launch some of them
    than they run. On the CPU with one thread, which ranks calls as several threads do.
    """
    if device.type == "cuda":
        return race_on_gpu(captured_calls(calls, device) or calls, device, seconds=seconds)
    with one_thread():
        return race(calls, seconds=seconds, clock=_clock)


def _clock() -> float:
    """This thread's CPU time, which other processes do not affect, plus a tenth of wall time for waiting."""
    return time.thread_time() + time.perf_counter() / 10
