"""A function captured as one CUDA graph per input signature after warm-up, with a fallback to the
function."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdynat.errors import first_line
from fastdynat.execution.fallbacks import Fallbacks
from fastdynat.execution.graph_capture import CaptureFailed, Recorder
from fastdynat.execution.graph_check import FunctionState, GraphCheck, Stateless
from fastdynat.execution.synchronization import waits_on_purpose
from fastdynat.execution.uncompiled import is_uncompiled

# cuDNN's search for algorithms, compilation and lazy allocations must be over before a capture.
WARM_UP_CALLS = 3


@dataclass
class _Captured:
    calls: int = 0
    inputs: tuple[Tensor, ...] = ()
    outputs: Any = None
    replay: Callable[[], None] | None = field(default=None)


class GraphedCall:
    """Runs `fn` eagerly for the first calls with each input signature and as a graph from then on.

    `fn` must do the same work for every input of one signature: no choice by value, no waiting for the
    device, no state of Python that changes between calls. The first calls are ordinary ones, not repetitions:
    a training step warms up on real batches and nothing has to be rolled back. Outputs are overwritten by the
    next call with the same signature.

    Each graph is compared with `fn` before its first use (`GraphCheck`), which takes two runs and leaves no
    trace. If that, a capture or a replay fails, the reason is added to `fallbacks`, all graphs are freed, and
    `fn` runs without graphs from then on. Processes that share collectives in `fn` (`on_all`) do so together;
    where one of them fails amid a run, whose collectives the others wait in, the error is raised."""

    def __init__(
        self,
        fn: Callable[..., Any],
        recorder: Recorder,
        fallbacks: Fallbacks,
        subject: FunctionState | None = None,
        *,
        on_all: Callable[[bool], bool] | None = None,
    ) -> None:
        """
        Args:
            subject: the state that `fn` changes besides its outputs; None is none.
            on_all: told whether all is well in this process; returns whether it is in all processes that take
                part in collectives of `fn`. All of them must run, capture and replay it equally often. None
                is no other process.
        """
        self._fn, self._recorder, self._fallbacks = fn, recorder, fallbacks
        self._subject, self._on_all = subject or Stateless(), on_all
        self._captured: dict[tuple[Any, ...], _Captured] = {}
        self.failed = False

    def __call__(self, *inputs: Tensor, constants: tuple[Any, ...] = ()) -> Any:
        """`constants`: Python values that `fn` reads from elsewhere; each set of them has a graph of its
        own."""
        if self.failed or is_uncompiled():
            return self._fn(*inputs)
        signature = (*constants, *((tuple(t.shape), t.stride(), t.dtype, t.device) for t in inputs))
        entry = self._captured.setdefault(signature, _Captured())
        if entry.replay is None and entry.calls < WARM_UP_CALLS:
            entry.calls += 1
            return self._recorder.warm(lambda: self._fn(*inputs))
        if entry.replay is None:
            self._capture(entry, inputs)
        return self._fn(*inputs) if self.failed else self._replay(entry, inputs)

    @waits_on_purpose()
    def _capture(self, entry: _Captured, inputs: tuple[Tensor, ...]) -> None:
        check = GraphCheck(self._fn, self._recorder, self._subject, inputs)
        try:
            check.reference()
            # clone keeps strides: the captured kernels are those of the inputs' memory format.
            entry.inputs = tuple(t.detach().clone(memory_format=torch.preserve_format) for t in inputs)
            failure = self._record(entry, check)
            if not self._well(failure is None):
                self._stop(failure or "the capture failed in another process")
                return
            assert entry.replay is not None
            difference = check.compare(entry.inputs, entry.outputs, entry.replay, self._well)
            if not self._well(difference is None):
                where = "in another process " if difference is None else ""
                said = "" if difference is None else f": {difference}"
                self._stop(f"{where}a replay differs from the function it was captured from{said}")
        except RuntimeError as error:  # out of memory, for one
            if self._on_all is not None:
                raise
            self._stop(f"a replay could not be checked: {first_line(error)}")
        finally:
            check.put_back()

    def _well(self, here: bool) -> bool:
        """True if all is well `here` and in the other processes."""
        return here if self._on_all is None else self._on_all(here)

    def _record(self, entry: _Captured, check: GraphCheck) -> str | None:
        """Capture the graph of `entry`; the reason where that failed."""
        try:
            with check.capturing():
                entry.outputs, entry.replay = self._recorder.capture(lambda: self._fn(*entry.inputs))
        except CaptureFailed as error:
            return f"the capture failed: {error}"
        return None

    def _replay(self, entry: _Captured, inputs: tuple[Tensor, ...]) -> Any:
        assert entry.replay is not None
        for static, new in zip(entry.inputs, inputs, strict=True):
            static.copy_(new)
        try:
            entry.replay()
        except RuntimeError as error:  # out of memory at the first launch, for one
            if self._on_all is not None:
                raise
            self._stop(f"a replay failed: {first_line(error)}")
            return self._fn(*inputs)
        return entry.outputs

    def release(self) -> None:
        """Free all graphs; the next call captures anew."""
        self._captured.clear()

    def _stop(self, why: str) -> None:
        self.failed = True
        self._captured.clear()
        self._fallbacks.add(f"CUDA graphs are off: {why}")
