"""Clocks: CUDA events on a GPU, the processor's clock elsewhere; rounds in which all rows take turns."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

MIN_ROUNDS, MAX_ROUNDS = 5, 100
GPU_SAMPLE_SECONDS = 0.05  # of back-to-back calls between two events


@dataclass(frozen=True)
class Samples:
    """Seconds per call, one number per round."""

    seconds: tuple[float, ...]

    def quantile(self, q: float) -> float:
        """Linear interpolation between the two nearest samples."""
        ordered = sorted(self.seconds)
        at = q * (len(ordered) - 1)
        low = math.floor(at)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (at - low) * (ordered[high] - ordered[low])

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    def summary(self) -> dict[str, float]:
        """Plain numbers for JSON."""
        numbers = {"median": self.median, "p20": self.quantile(0.2), "p80": self.quantile(0.8)}
        numbers |= {"min": min(self.seconds), "max": max(self.seconds)}
        return {key: float(f"{value:.5g}") for key, value in numbers.items()} | {"rounds": len(self.seconds)}


class Stopwatch:
    """Times work on `device` without making the device wait in between."""

    def __init__(self, device: torch.device) -> None:
        self.gpu, self._device = device.type == "cuda", device

    def mark(self) -> Any:
        """A moment: on a GPU when it has done what was asked of it so far."""
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        """Between two marks; waits for the second."""
        if not self.gpu:
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    def wait(self) -> None:
        """Wait until a GPU has done what was asked of it so far."""
        if self.gpu:
            torch.cuda.synchronize(self._device)

    def time(self, call: Callable[[], object], calls: int = 1) -> float:
        """Seconds per call of `calls` calls in a row."""
        self.wait()
        begin = self.mark()
        for _ in range(calls):
            call()
        return self.seconds(begin, self.mark()) / calls

    def calls_per_sample(self, seconds: float) -> int:
        """Calls that one sample needs where each takes `seconds`: events are too coarse for a single short
        one.
        """
        return max(1, math.ceil(GPU_SAMPLE_SECONDS / seconds)) if self.gpu else 1


def rounds(each: Sequence[float], *, seconds: float, repeats: int | None) -> int:
    """Rounds that give every row about `seconds`, where one sample of each takes as long as `each` says."""
    return repeats or max(MIN_ROUNDS, min(MAX_ROUNDS, math.ceil(seconds * len(each) / sum(each))))


def take_turns(
    watch: Stopwatch, calls: Sequence[Callable[[], object]], *, seconds: float, repeats: int | None
) -> list[Samples]:
    """Time warm `calls` in rounds, A B A B ..., so that what disturbs the machine for a while disturbs them
    all.
    """
    if not calls:
        return []
    once = [watch.time(call) for call in calls]
    in_a_row = [watch.calls_per_sample(t) for t in once]
    number = rounds([t * n for t, n in zip(once, in_a_row, strict=True)], seconds=seconds, repeats=repeats)
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(number):
        for call, n, taken in zip(calls, in_a_row, samples, strict=True):
            taken.append(watch.time(call, n))
    return [Samples(tuple(taken)) for taken in samples]
