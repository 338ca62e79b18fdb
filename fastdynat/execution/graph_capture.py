"""Capturing CUDA graphs. A failed capture leaves no trace in streams, generators, allocators or threads."""

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch

from fastdynat.errors import first_line


class CaptureFailed(RuntimeError):
    """Why a function could not be captured, in one line. It has not run, and everything is as it was
    before.
    """


class Recorder(Protocol):
    """Where graphs come from."""

    def warm(self, fn: Callable[[], Any]) -> Any:
        """Run `fn` once as it will be captured, and return what it returned."""

    def capture(self, fn: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Record `fn` without running it; return its outputs, which each call of the second result fills
        anew.

        The second result may raise RuntimeError, having launched nothing and drawn nothing.

        Raises:
            CaptureFailed: `fn` cannot be captured.
        """


class CudaRecorder:
    """Records CUDA graphs on a stream of its own; all of its graphs share one memory pool, so they must not
    run at once.
    """

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
        finally:  # after an error too: what was launched may still be at work on tensors that are now freed
            here.wait_stream(self._stream)

    def capture(self, fn: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        if not self._alive:
            # The allocator takes no new graphs into a pool all of whose graphs are gone.
            self._pool = torch.cuda.graph_pool_handle()
        graph, raised, outputs = torch.cuda.CUDAGraph(), list[BaseException](), None
        # Loaders' threads may allocate meanwhile; only what this thread does must be fit for a graph.
        recording = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        try:
            # The outer stream context is for torch.cuda.graph, which leaves its stream current where a
            # capture ends badly.
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
        """Undo what a capture that went wrong has left behind.

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
        """Whether the device's generator gives numbers; none is used up."""
        generator = torch.cuda.default_generators[self._index]
        offset = generator.get_offset()
        try:
            torch.rand(1, device=self._stream.device)
        finally:
            generator.set_offset(offset)
        return True

    def _capture_nothing(self) -> None:
        """A capture that ends well takes the generator out of its capturing state, and other graphs can go on
        with it.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the graph is empty
            graph.capture_begin(capture_error_mode="thread_local")
            graph.capture_end()

    def _other_generator_state(self) -> None:
        """The last resort: the same seed and offset in a state that no graph knows; replays of earlier graphs
        then raise.
        """
        generator = torch.cuda.default_generators[self._index]
        generator.graphsafe_set_state(generator.clone_state())


def _noting(fn: Callable[[], Any], raised: list[BaseException]) -> Any:
    """`fn`'s result; what it raises goes to `raised` too."""
    try:
        return fn()
    except BaseException as error:
        raised.append(error)
        raise


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keeps what waits for the device or frees its objects out of a capture: the garbage collector, cuDNN's
    timings.

    Without `benchmark` cuDNN uses what it found in the warm-up, and its heuristics for what is new.
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
