"""Timing alternatives against each other on a GPU, by events on the current stream."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

WARM_UP, MIN_ROUNDS, MAX_ROUNDS = 3, 5, 50


def race_on_gpu(
    calls: Mapping[str, Callable[[], object]], device: torch.device, *, seconds: float = 0.2
) -> dict[str, float]:
    """The median seconds per call of each of `calls` on the current stream of `device`, timed in turns.

    Before each call the second-level cache is overwritten, so that all find it the same; that also takes the
    GPU long enough for the call's launches to be queued meanwhile. Waits for the device.

    seconds: stop after the round in which so much time has passed, but not before the fifth.
    """
    stream = torch.cuda.current_stream(device)
    cache = int(torch.cuda.get_device_properties(device).L2_cache_size)
    scrub = torch.empty(2 * max(cache, 1 << 20), dtype=torch.uint8, device=device)
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for number in range(MAX_ROUNDS):
        if number >= MIN_ROUNDS and time.perf_counter() - begin > seconds:
            break
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            scrub.zero_()
            start.record(stream)
            call()
            end.record(stream)
            end.synchronize()
            taken[name].append(start.elapsed_time(end) / 1000)
    return {name: statistics.median(times) for name, times in taken.items()}


def copy_bandwidth(device: torch.device, size: int = 1 << 28) -> float:
    """Bytes per second, read and written together, of a copy of `size` bytes on `device`: what a single pass
    can reach.
    """
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / race_on_gpu({"copy": lambda: target.copy_(source)}, device)["copy"]
