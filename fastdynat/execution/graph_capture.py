"""Capture of CUDA graphs; a failed one leaves no trace in streams, generators, allocators or threads."""

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch

from fastdynat.errors import first_line


class CaptureFailed(RuntimeError):
    """A function could not be captured, with the reason in one line. It has not run; no state has changed."""


class Recorder(Protocol):
    """A way to capture graphs: `CudaRecorder`, or a simulation in tests."""

    def warm(self, fn: Callable[[], Any]) -> Any:
        """Run `fn` once on the capture stream and return its result."""

    def capture(self, fn: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Capture `fn` without running it; return its outputs and `replay`, which fills them anew.

        `replay` may raise RuntimeError; it has then launched nothing and drawn no random numbers.

        Raises:
            CaptureFailed: `fn` cannot be captured.
        """


class CudaRecorder:
    """Captures CUDA graphs on its own stream; they share one memory pool and must not run concurrently."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._index: int = self._stream.device.index
        self._pool = torch.cuda.graph_pool_handle()
        self._alive: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._abandoned: list[torch.cuda.CUDAGraph] = []

    def warm(self, fn: Callable[[], Any]) -> Any:
        here = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(here)
        try:
            with torch.cuda.stream(self._stream):
                return fn()
        finally:  # after an error, too: launched kernels may still use tensors that are now freed
            here.wait_stream(self._stream)

    def capture(self, fn: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        if not self._alive:
            # The allocator accepts no new graph in a pool whose graphs are all gone.
            self._pool = torch.cuda.graph_pool_handle()
        graph, raised, outputs = torch.cuda.CUDAGraph(), list[BaseException](), None
        # Only this thread's calls must be capturable: loaders' threads may allocate meanwhile.
        recording = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        try:
            # The outer stream context restores the stream, as torch.cuda.graph does not where a capture
            # fails.
            with torch.cuda.stream(self._stream), _undisturbed(), recording:
                outputs = _noting(fn, raised)
        except BaseException as error:
            self._abandon(graph)
            # Ending a broken capture raises too, and would hide what broke it, or Ctrl-C.
            cause = raised.pop() if raised else error
            if not isinstance(cause, Exception):
                raise cause from None
            why = first_line(cause)
            del cause  # else its traceback holds this frame, and this frame it, with all tensors of `fn`
            raise CaptureFailed(why) from None
        self._alive.add(graph)
        return outputs, self._replay_of(graph)

    def _replay_of(self, graph: torch.cuda.CUDAGraph) -> Callable[[], None]:
        generator = torch.cuda.default_generators[self._index]

        def replay() -> None:
            offset = generator.get_offset()
            try:
                graph.replay()
            except RuntimeError:
                generator.set_offset(offset)
                raise

        return replay

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Clean up after a failed capture.

        Up to torch 2.11 ``capture_end`` stops at its first error: the allocator goes on recording, which
        forbids it to give memory back, and the generator goes on capturing, which forbids it to draw. From
        2.14 on ``reset`` sees to both.
        """
        with suppress(RuntimeError), torch.cuda.stream(self._stream):
            if torch.cuda.is_current_stream_capturing():
                graph.capture_end()
        with suppress(RuntimeError):
            graph.reset()
        with suppress(RuntimeError):  # where the allocator was told already
            torch._C._cuda_endAllocateToPool(self._index, self._pool)
            torch._C._cuda_releasePool(self._index, self._pool)
        # The allocator of pinned memory may go on asking it whether a stream is its own, in versions where
        # nobody can stop it.
        self._abandoned.append(graph)
        if not self._alive:
            self._pool = torch.cuda.graph_pool_handle()
        for remedy in (lambda: None, self._capture_nothing, self._other_generator_state):
            with suppress(RuntimeError):
                remedy()
                if self._draws():
                    break

    def _draws(self) -> bool:
        """True if the device's generator can draw; its state is not advanced."""
        generator = torch.cuda.default_generators[self._index]
        offset = generator.get_offset()
        try:
            torch.rand(1, device=self._stream.device)
        finally:
            generator.set_offset(offset)
        return True

    def _capture_nothing(self) -> None:
        """Capture an empty graph: that ends the generator's capturing state, and other graphs keep
        working."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the graph is empty
            graph.capture_begin(capture_error_mode="thread_local")
            graph.capture_end()

    def _other_generator_state(self) -> None:
        """The last resort: a new generator state with the same seed and offset. Earlier graphs then raise."""
        generator = torch.cuda.default_generators[self._index]
        generator.graphsafe_set_state(generator.clone_state())


def _noting(fn: Callable[[], Any], raised: list[BaseException]) -> Any:
    """Call `fn`; an error is appended to `raised` and raised."""
    try:
        return fn()
    except BaseException as error:
        raised.append(error)
        raise


@contextmanager
def _undisturbed() -> Iterator[None]:
    """A context without garbage collection and cuDNN benchmarking, which wait for the device or free memory.

    With `benchmark` off, cuDNN uses the algorithms found in the warm-up, and its heuristics for others.
    """
    collecting, timing = gc.isenabled(), torch.backends.cudnn.benchmark
    gc.disable()
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = timing
        if collecting:
            gc.enable()
