"""Calls as CUDA graphs, to time what the GPU does in them without the time that Python takes to launch it."""

from collections.abc import Callable, Mapping

import torch

from fastdynat.execution.graph_capture import CaptureFailed, CudaRecorder
from fastdynat.execution.graphed_call import WARM_UP_CALLS


def captured_calls(
    calls: Mapping[str, Callable[[], object]], device: torch.device
) -> dict[str, Callable[[], object]] | None:
    """The replay of each of `calls`; None if one of them cannot be captured, as all are to be timed alike."""
    recorder = CudaRecorder(device)
    replays: dict[str, Callable[[], object]] = {}
    for name, call in calls.items():
        for _ in range(WARM_UP_CALLS):
            recorder.warm(call)
        try:
            _, replays[name] = recorder.capture(call)
        except CaptureFailed:
            return None
    return replays
