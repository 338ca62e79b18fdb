"""Streams on the CPU: every access to memory is ordered by an event after what it depends on, or is a race.

Each operator runs at once, and is entered with the stream that it would be on. Vector clocks tell whether it
comes after the last write of what it reads, and after all uses of what it overwrites. A backward pass counts
as on the stream that asked for it, which is where autograd makes its result visible.
"""

import weakref
from collections import defaultdict
from contextlib import contextmanager
from typing import Any

from support.graph_sim import written_tensors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Clock = dict[int, int]


class Stream:
    """A stream with a vector clock of the work that precedes its next operation."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.clock: Clock = defaultdict(int)

    def wait(self, other: Clock) -> None:
        for number, time in other.items():
            self.clock[number] = max(self.clock[number], time)

    def wait_stream(self, other: "Stream") -> None:
        self.wait(other.clock)

    def record_event(self) -> Clock:
        return dict(self.clock)

    def wait_event(self, event: Clock) -> None:
        self.wait(event)


class Watch(TorchDispatchMode):
    """Enters every operator with the current stream and lists accesses that nothing orders."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.side = Stream(0), Stream(1)
        self.current = self.main
        self.side_work = 0
        self.races: list[str] = []
        self._writes: dict[int, tuple[int, int]] = {}
        self._reads: dict[int, dict[int, int]] = defaultdict(dict)

    @contextmanager
    def on(self, stream: Stream) -> Any:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def _storage(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._reads and storage._cdata not in self._writes:
            self._reads[storage._cdata] = {}
        return storage._cdata

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        if func.is_view:
            return results
        stream = self.current
        stream.clock[stream.number] += 1
        now = stream.clock[stream.number]
        self.side_work += stream is self.side
        written = {id(t) for t in written_tensors(func, args, kwargs)}
        for tensor in (t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)):
            self._access(func, tensor, now, write=id(tensor) in written)
        for tensor in (t for t in tree_leaves(results) if isinstance(t, Tensor)):
            self._keep(tensor)
            self._writes[self._storage(tensor)] = (stream.number, now)
        return results

    def _access(self, func: Any, tensor: Tensor, now: int, *, write: bool) -> None:
        stream, key = self.current, self._storage(tensor)
        before = [self._writes[key]] if key in self._writes else []
        if write:
            before += list(self._reads[key].items())
        for number, time in before:
            if number != stream.number and stream.clock[number] < time:
                what = "writes" if write else "reads"
                self.races.append(
                    f"{func} on stream {stream.number} {what} {tuple(tensor.shape)} "
                    f"before stream {number} is done"
                )
        if write:
            self._writes[key] = (stream.number, now)
            self._reads[key] = {}
        else:
            self._reads[key][stream.number] = now

    def _keep(self, tensor: Tensor) -> None:
        """Forget memory that is given back: its address may be another tensor's next."""
        storage = tensor.untyped_storage()
        weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self._writes.pop(key, None)
        self._reads.pop(key, None)
