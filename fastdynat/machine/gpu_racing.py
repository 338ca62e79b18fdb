"""Timing alternatives against each other on a GPU, by events on the current stream."""

import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch

WARM_UP, MIN_ROUNDS, MAX_ROUNDS = 3, 5, 50
MAX_SCRUBS = 100
HEAD_START = 2.0  # times the longest launch that the GPU is busy before a call


def race_on_gpu(
    calls: Mapping[str, Callable[[], object]], device: torch.device, *, seconds: float = 0.2
) -> dict[str, float]:
    """The median seconds that `device` takes per call of each of `calls` on its current stream, in turns.

    Before each call the second-level cache is overwritten, so that all find it the same: as often as it takes
    for the launches of any of them to be queued meanwhile, so that no time of Python's is measured. Waits for
    the device.

    seconds: stop after the round in which so much time has passed, but not before the fifth.
    """
    stream = torch.cuda.current_stream(device)
    cache = int(torch.cuda.get_device_properties(device).L2_cache_size)
    scrub = torch.empty(2 * max(cache, 1 << 20), dtype=torch.uint8, device=device)

    def timed(call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(stream)
        call()
        end.record(stream)
        end.synchronize()
        return start.elapsed_time(end) / 1000

    launch = max((_least_launch(call) for call in calls.values()), default=0.0)
    one = [timed(scrub.zero_) for _ in range(WARM_UP)][-1]
    scrubs = min(MAX_SCRUBS, max(1, math.ceil(HEAD_START * launch / one))) if one else 1
    taken: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for number in range(MAX_ROUNDS):
        if number >= MIN_ROUNDS and time.perf_counter() - begin > seconds:
            break
        for name, call in calls.items():
            for _ in range(scrubs):
                scrub.zero_()
            taken[name].append(timed(call))
    return {name: statistics.median(times) for name, times in taken.items()}


def _least_launch(call: Callable[[], object]) -> float:
    """Seconds that the host takes to launch `call`, which is warm afterwards."""
    took = []
    for _ in range(WARM_UP):
        begin = time.perf_counter()
        call()
        took.append(time.perf_counter() - begin)
    return min(took)


def copy_bandwidth(device: torch.device, size: int = 1 << 28) -> float:
    """Bytes per second, read and written together, of a copy of `size` bytes on `device`: what a single pass
    can reach.
    """
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / race_on_gpu({"copy": lambda: target.copy_(source)}, device)["copy"]
