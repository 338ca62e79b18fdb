"""The time of a step by kind of operation, from torch's profiler."""

import re
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from fastdynat.commands.bench.stopwatch import Stopwatch

CONV_FORWARD, CONV_INPUT, CONV_WEIGHT = "conv forward", "conv input gradient", "conv weight gradient"
BATCH_NORM, FUSED, OPTIMISER, POINTWISE, OVERHEAD = (
    "batch norm",
    "fused operators",
    "optimiser",
    "activation, pointwise",
    "Python, overhead",
)
KINDS = (
    CONV_FORWARD,
    CONV_INPUT,
    CONV_WEIGHT,
    "matrix products",
    BATCH_NORM,
    POINTWISE,
    FUSED,
    OPTIMISER,
    "copies, layout",
    OVERHEAD,
)
CONV_BACKWARD = "convolution_backward"
# What happens inside of these is theirs.
_WHOLE = ((r"^Optimizer\.", OPTIMISER), (r"^fastdynat::", FUSED))
_KIND = (
    # A compiled kernel is named after all it fuses, so what costs most in it decides.
    (r"fused.*batch_norm", BATCH_NORM),
    (r"_fused_", POINTWISE),
    (CONV_BACKWARD, CONV_BACKWARD),
    (r"convolution|conv[123]d", CONV_FORWARD),
    (r"batch_norm", BATCH_NORM),
    (r"copy_$|_to_copy|^aten::to$|contiguous|clone|reorder", "copies, layout"),
    (r"\bmm$|addmm|bmm|linear|matmul", "matrix products"),
)
_ANY_OPERATOR = re.compile(r"^(aten|prims|inductor|mkldnn)::")
CALLS = 3


def profile_step(call: Callable[[], object], watch: Stopwatch, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of one warm `call` by kind, in the order of `KINDS`; they sum to its time when profiled.

    On a GPU these are the seconds of its kernels, and the last kind is the time in which none ran.

    dtype: of the convolutions that have both gradients taken in one operator, whose two halves are timed
    apart to divide it.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if watch.gpu else [])
    with profile(activities=activities, record_shapes=True, acc_events=True) as trace:
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        watch.wait()
        whole = time.perf_counter() - begin
    halves = _Halves(watch, dtype)
    taken: dict[str, float] = defaultdict(float)
    for event in trace.events():
        if event.device_type != DeviceType.CPU:
            continue  # kernels count where they were launched
        seconds = (event.self_device_time_total if watch.gpu else event.self_cpu_time_total) / 1e6
        for kind, share in halves.divide(*_kind(event)):
            taken[kind] += share * seconds
    known = sum(seconds for kind, seconds in taken.items() if kind != OVERHEAD)
    taken[OVERHEAD] = max(0.0, whole - known)
    return {kind: taken[kind] / CALLS for kind in KINDS}


def _kind(event: FunctionEvent) -> tuple[str, FunctionEvent]:
    """The kind of an event, and the event that decides it: itself, or the nearest enclosing one that can."""
    chain = [event]
    while chain[-1].cpu_parent is not None:
        chain.append(chain[-1].cpu_parent)
    for table in (_WHOLE, _KIND):
        for around in chain:
            for pattern, kind in table:
                if re.search(pattern, around.name):
                    return kind, around
    return (POINTWISE if _ANY_OPERATOR.search(event.name) else OVERHEAD), event


class _Halves:
    """Time of a call that takes both gradients of a convolution, split between them by its shapes."""

    def __init__(self, watch: Stopwatch, dtype: torch.dtype) -> None:
        self._watch, self._dtype = watch, dtype
        self._device = "cuda" if watch.gpu else "cpu"
        self._known: dict[str, float] = {}

    def divide(self, kind: str, event: FunctionEvent) -> list[tuple[str, float]]:
        if kind != CONV_BACKWARD:
            return [(kind, 1.0)]
        wants = event.concrete_inputs[-1] if event.concrete_inputs else None
        if not isinstance(wants, list) or len(wants) != 3:  # an operator inside the one that has the list
            around = event.cpu_parent
            return (
                self.divide(kind, around)
                if around is not None and CONV_BACKWARD in around.name
                else [(CONV_INPUT, 1.0)]
            )
        if not wants[1]:
            return [(CONV_INPUT, 1.0)]
        if not wants[0]:
            return [(CONV_WEIGHT, 1.0)]
        key = repr((event.input_shapes[:3], event.concrete_inputs[4:10]))
        if key not in self._known:
            self._known[key] = self._share_of_input(event)
        return [(CONV_INPUT, self._known[key]), (CONV_WEIGHT, 1 - self._known[key])]

    def _share_of_input(self, event: FunctionEvent) -> float:
        def tensor(shape: list[int]) -> torch.Tensor:
            return torch.rand(shape, device=self._device).to(self._dtype, memory_format=torch.channels_last)

        shapes: Any = event.input_shapes[:3]
        tensors = [tensor(shape) for shape in shapes]
        rest: Any = event.concrete_inputs[4:10]

        def seconds(mask: list[bool]) -> float:
            def call() -> object:
                return torch.ops.aten.convolution_backward(*tensors, None, *rest, mask)

            call()
            return min(self._watch.time(call) for _ in range(3))

        of_input, of_weight = seconds([True, False, False]), seconds([False, True, False])
        return of_input / (of_input + of_weight)
