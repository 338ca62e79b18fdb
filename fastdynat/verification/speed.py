"""The fastest correct implementation at a given size: measured once per size, and stored."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace

import torch

from fastdynat.machine import one_thread, race, race_on_gpu
from fastdynat.verification import verdict_store
from fastdynat.verification.judge import checking_lock
from fastdynat.verification.operator_check import registered

# By how much another one must be faster than the preferred one. On the CPU no timing near that decides, so
# that machines of one kind choose alike, and what they compute is the same to the last bit.
MARGIN = {"cpu": 0.5, "cuda": 0.1}
SECONDS, AGAIN = 0.02, 0.2  # of a race, and of the second one that has to confirm an upset

_winners: dict[tuple[str, torch.device, str], str] = {}


def winner(name: str, device: torch.device, size: str) -> str | None:
    """What `fastest` has said in this process."""
    return _winners.get((name, device, size))


def fastest(name: str, device: torch.device, size: str, calls: Mapping[str, Callable[[], object]]) -> str:
    """The fastest of `calls`, each a call of an implementation of check `name` that is right on `device`.

    The first one is preferred: it wins unless another one is clearly faster (`MARGIN`), is the only one that
    is not timed out of the race by an error, or where nothing can be remembered, as another process would
    then choose otherwise.

    size: names what is measured, for whoever asks again.
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
    if size not in before.fastest or set(before.fastest[size]) != set(calls):
        if not verdict_store.writable():
            return None
        seconds = _race(calls, device)
        stored = verdict_store.load_verdicts(
            key
        )  # with what others wrote meanwhile; the first to measure a size decides
        if set(stored.fastest.get(size, {})) != set(calls):
            stored = replace(stored, fastest=stored.fastest | {size: seconds})
            if not verdict_store.save_verdicts(stored):
                return None
        before = stored
    return best({candidate: before.fastest[size][candidate] for candidate in calls}, device)


def best(seconds: Mapping[str, float], device: torch.device) -> str:
    """The first name in `seconds`, or the fastest where that is faster by `MARGIN`. Infinite: could not be
    timed.
    """
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
    """Seconds per call, on whichever device; on the CPU of one thread, whose order is that of several."""
    if device.type == "cuda":
        return race_on_gpu(calls, device, seconds=seconds)
    with one_thread():
        return race(calls, seconds=seconds, clock=_clock)


def _clock() -> float:
    """What this thread computed, which other processes do not touch, and a tenth of all time, so that waiting
    counts.
    """
    return time.thread_time() + time.perf_counter() / 10
