"""Functions of tensors, captured once per input signature as a CUDA graph and replayed: one launch instead of hundreds."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

# cuDNN's search for algorithms, compilation and lazy allocations must be over before a capture.
WARM_UP_CALLS = 3


class Recorder(Protocol):
    """Where graphs come from."""

    def warm(self, fn: Callable[[], Any]) -> Any:
        """Run `fn` once as it will be captured, and return what it returned."""

    def capture(self, fn: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Record `fn` without running it; return its outputs, which each call of the second result fills anew."""


class CudaRecorder:
    """Records CUDA graphs on a stream of its own; all of its graphs share one memory pool, so they must not run at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm(self, fn: Callable[[], Any]) -> Any:
        here = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            result = fn()
        here.wait_stream(self._stream)
        return result

    def capture(self, fn: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # Loaders' threads may allocate meanwhile; only what this thread does must be fit for a graph.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            outputs = fn()
        return outputs, graph.replay


@dataclass
class _Captured:
    calls: int = 0
    inputs: tuple[Tensor, ...] = ()
    outputs: Any = None
    replay: Callable[[], None] | None = field(default=None)


class GraphedCall:
    """`fn`, run as it is for the first calls with each input signature, from then on as a graph.

    `fn` must do the same work for every input of one signature: no choice by value, no waiting for the device, no state of
    Python that changes between calls. The first calls are ordinary ones, not repetitions: a training step warms up on real
    batches and nothing has to be rolled back. Outputs are overwritten by the next call with the same signature.

    Where a capture fails, `say` is told why, once, and `fn` runs without graphs from then on.
    """

    def __init__(self, fn: Callable[..., Any], recorder: Recorder, say: Callable[[str], None]) -> None:
        self._fn, self._recorder, self._say = fn, recorder, say
        self._captured: dict[tuple[Any, ...], _Captured] = {}
        self.failed = False

    def __call__(self, *inputs: Tensor, constants: tuple[Any, ...] = ()) -> Any:
        """`constants`: values of Python that `fn` reads from elsewhere; another set of them is another graph."""
        if self.failed:
            return self._fn(*inputs)
        signature = (*constants, *((tuple(t.shape), t.stride(), t.dtype, t.device) for t in inputs))
        entry = self._captured.setdefault(signature, _Captured())
        if entry.replay is None:
            if entry.calls < WARM_UP_CALLS:
                entry.calls += 1
                return self._recorder.warm(lambda: self._fn(*inputs))
            if not self._capture(entry, inputs):
                return self._fn(*inputs)
        assert entry.replay is not None
        for static, new in zip(entry.inputs, inputs, strict=True):
            static.copy_(new)
        entry.replay()
        return entry.outputs

    def _capture(self, entry: _Captured, inputs: tuple[Tensor, ...]) -> bool:
        # clone keeps strides: the captured kernels are those of the inputs' memory format.
        entry.inputs = tuple(t.detach().clone(memory_format=torch.preserve_format) for t in inputs)
        try:
            entry.outputs, entry.replay = self._recorder.capture(lambda: self._fn(*entry.inputs))
        except RuntimeError as error:
            self.failed = True
            self._say(f"CUDA graphs are off, the capture failed: {str(error).splitlines()[0]}")
        return not self.failed
