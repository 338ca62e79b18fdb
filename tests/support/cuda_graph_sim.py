"""torch.cuda's graph support on the CPU: streams, the generator's capture state, private memory pools.

Written after torch's own sources (ATen/cuda/CUDAGraph.cpp, CUDAGeneratorImpl.cpp,
c10/cuda/CUDACachingAllocator.cpp); the context manager `torch.cuda.graph` is torch's own, with its order of
exits. With "2.11" ``capture_end`` stops at its first error, with "2.14" ``reset`` gives back what it left.
Operators run at once, on whatever stream: simulated is the bookkeeping.
"""

import itertools
from typing import Any

import pytest
import torch
from support.graph_sim import Tape
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("cpu", 0)
INVALIDATED = "CUDA error: operation failed due to a previous error during capture"
UNJOINED = "CUDA error: capturing stream has unjoined work"


class SimulatedCuda(TorchDispatchMode):
    """The state of one device. Within it torch.cuda's names for streams and graphs are the simulated ones."""

    def __init__(self, version: str = "2.11") -> None:
        super().__init__()
        self.version = version
        self.default = Stream(self)
        self.current = self.default
        self.generator = Generator(self)
        self.capturing: Graph | None = None
        self.pools: dict[Any, int] = {}  # use counts; at 0 a pool waits for its memory to be given back
        self.recording: list[Any] = []  # pools that allocations are routed to
        self.captures = 0
        self._patch = pytest.MonkeyPatch()
        self._handles = itertools.count(1)

    def __enter__(self) -> Any:
        names: dict[str, Any] = {
            "Stream": lambda device=None: Stream(self),
            "CUDAGraph": lambda: Graph(self),
            "current_stream": lambda device=None: self.current,
            "set_stream": lambda stream: setattr(self, "current", stream),
            "stream": lambda stream: StreamContext(self, stream),
            "synchronize": self._synchronize,
            "empty_cache": self.empty_cache,
            "graph_pool_handle": lambda: (0, next(self._handles)),
            "default_generators": (self.generator,),
            "is_current_stream_capturing": lambda: self.current.capturing,
        }
        for name, value in names.items():
            self._patch.setattr(torch.cuda, name, value)
        self._patch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
        self._patch.setattr(torch._C, "_cuda_endAllocateToPool", self._end_allocate, raising=False)
        self._patch.setattr(torch._C, "_cuda_releasePool", self.release, raising=False)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._patch.undo()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.generator.draw()
        return func(*args, **(kwargs or {}))

    def _synchronize(self) -> None:
        if self.capturing is not None:
            self.capturing.tape.broken = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def empty_cache(self) -> None:
        if self.recording:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")
        self.pools = {pool: count for pool, count in self.pools.items() if count > 0}

    def begin_allocate(self, pool: Any) -> None:
        if self.pools.get(pool, 1) <= 0:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        self.pools[pool] = self.pools.get(pool, 0) + 1
        self.recording.append(pool)

    def _end_allocate(self, index: int, pool: Any) -> None:
        if pool not in self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording.remove(pool)

    def release(self, index: int, pool: Any) -> None:
        assert self.pools[pool] > 0
        self.pools[pool] -= 1


class Stream:
    def __init__(self, cuda: SimulatedCuda) -> None:
        self._cuda, self.device, self.capturing = cuda, DEVICE, False
        self.waited_for: list[Stream] = []

    def wait_stream(self, other: "Stream") -> None:
        self.waited_for.append(other)
        graph = self._cuda.capturing
        if graph is not None and other.capturing and not self.capturing:
            self.capturing = True
            graph.forked.append(self)
        elif graph is not None and self is graph.stream and other in graph.forked:
            other.capturing = False
            graph.forked.remove(other)


class StreamContext:
    """`torch.cuda.stream`; not left unless its exit is called."""

    def __init__(self, cuda: SimulatedCuda, stream: Stream) -> None:
        self._cuda, self._stream, self._before = cuda, stream, stream

    def __enter__(self) -> None:
        self._before, self._cuda.current = self._cuda.current, self._stream

    def __exit__(self, *error: object) -> None:
        self._cuda.current = self._before


class Generator:
    """Offsets stand for states of torch's CPU generator."""

    def __init__(self, cuda: SimulatedCuda) -> None:
        self._cuda, self.capturing, self._offset = cuda, False, 0
        self._states: dict[int, Any] = {}

    def draw(self) -> None:
        if self._cuda.current.capturing:
            if not self.capturing:
                raise RuntimeError("Attempt to increase offset for a CUDA generator not in capture mode.")
            return
        if self.capturing:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        self._offset += 4

    def get_offset(self) -> int:
        assert not self._cuda.current.capturing
        self._states[self._offset] = torch.get_rng_state()
        return self._offset

    def set_offset(self, offset: int) -> None:
        assert not self._cuda.current.capturing
        self._offset = offset
        torch.set_rng_state(self._states[offset])

    def clone_state(self) -> "Generator":
        return Generator(self._cuda)

    def graphsafe_set_state(self, other: "Generator") -> None:
        self.capturing = other.capturing


class Graph:
    """`torch.cuda.CUDAGraph`."""

    def __init__(self, cuda: SimulatedCuda) -> None:
        self._cuda, self.stream, self._pool = cuda, cuda.current, None
        self.tape, self.forked = Tape(), list[Stream]()
        self._ended = self._allocated = False

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global", **others: Any) -> None:
        cuda = self._cuda
        if cuda.current is cuda.default:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        assert capture_error_mode == "thread_local"
        if cuda.version == "2.11":
            cuda.generator.capturing = True
        self.stream, self._pool = cuda.current, pool or torch.cuda.graph_pool_handle()
        cuda.begin_allocate(self._pool)
        self._allocated = True
        self._random = torch.get_rng_state()
        cuda.generator.capturing = self.stream.capturing = True
        cuda.capturing = self
        self.tape.__enter__()

    def capture_end(self) -> None:
        cuda = self._cuda
        if cuda.current is not self.stream:
            raise RuntimeError("Capture must end on the same stream it began on.")
        self.tape.__exit__(None, None, None)
        self.tape.undo()
        torch.set_rng_state(self._random)
        unjoined = self.forked
        for stream in (self.stream, *unjoined):
            stream.capturing = False
        cuda.capturing, self.forked = None, []
        if cuda.version == "2.14":
            cuda.generator.capturing = False
        if self.tape.broken or unjoined:
            message, self.tape = INVALIDATED if self.tape.broken else UNJOINED, Tape()
            raise RuntimeError(message)
        cuda._end_allocate(0, self._pool)
        cuda.generator.capturing = False
        self._ended, cuda.captures = True, cuda.captures + 1

    def replay(self) -> None:
        if self._cuda.generator.capturing:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        self.tape.replay()

    def reset(self) -> None:
        if self._cuda.version == "2.14" and self._allocated and self._pool in self._cuda.recording:
            self._cuda._end_allocate(0, self._pool)
            self._ended = True
        if self._ended:
            self._cuda.release(0, self._pool)
            self._ended = self._allocated = False

    def __del__(self) -> None:
        self.reset()
