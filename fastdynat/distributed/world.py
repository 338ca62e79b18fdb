"""The processes started by ``torchrun``: rank, world size and collectives."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
PIECE = 2**26  # bytes that a broadcast copies at a time


@dataclass(frozen=True)
class World:
    """This process's rank among the processes that work together, and collectives over them.

    Attributes:
        rank: rank of this process; rank 0 writes files and progress.
        size: world size.
        local_rank: rank of this process on its machine, which is the index of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """True on rank 0, the only process that writes."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace `tensor`, in place, by its sum over the ranks; every rank must call it. Returns it."""
        if not self.alone:
            _count_call()
            dist.all_reduce(tensor)
        return tensor

    def gather_rows_(self, rows: Tensor, own: Tensor) -> None:
        """Fill `rows` (size, n) with the vectors `own` (n,) of the ranks; every rank must call it."""
        if self.alone:
            rows[0] = own
            return
        _count_call()
        dist.all_gather_into_tensor(rows.view(-1), own)  # gloo wants the number of dimensions of `own`

    def start_sum_(self, tensor: Tensor) -> "PendingSum":
        """Begin `sum_`; `tensor` must not be touched before `PendingSum.wait`."""
        if self.alone:
            return PendingSum(None)
        _count_call()
        return PendingSum(dist.all_reduce(tensor, async_op=True))

    def stacked(self, tensor: Tensor) -> Tensor:
        """The `tensor` of every rank, stacked: (W, ...), in the order of the ranks."""
        if self.alone:
            return tensor[None]
        held = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(held, tensor.contiguous())
        return torch.stack(held)

    def maximum(self, value: float) -> float:
        """The largest `value` of all ranks; on the host."""
        if self.alone:
            return value
        _count_call()
        found = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return float(found)

    @torch.no_grad()
    def broadcast_(self, tensors: Sequence[Tensor], source: int = 0, *, piece: int = PIECE) -> None:
        """Overwrite `tensors` on every rank by those of rank `source`, of any dtypes and memory formats.

        They are sent as bytes, up to `piece` of them at a time: NCCL takes neither all dtypes nor tensors
        with gaps.
        """
        for group in () if self.alone else _groups(tensors, piece):
            _count_call()
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            dist.broadcast(flat.view(torch.uint8), source)
            for tensor, sent in zip(group, flat.split([t.numel() for t in group]), strict=True):
                tensor.copy_(sent.view(tensor.shape))

    def from_first(self, value: T) -> T:
        """Rank 0's `value`, any picklable object, on every rank; what other ranks pass is ignored."""
        if self.alone:
            return value
        _count_call()
        held: list[Any] = [value]
        dist.broadcast_object_list(held, 0)
        return held[0]

    def gather(self, value: T) -> list[T]:
        """The `value` of every rank, picklable objects, in the order of the ranks."""
        if self.alone:
            return [value]
        _count_call()
        held: list[Any] = [None] * self.size
        dist.all_gather_object(held, value)
        return held

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.maximum(0.0)


def _groups(tensors: Sequence[Tensor], piece: int) -> Iterator[list[Tensor]]:
    """`tensors` in groups of one dtype and device, of at most `piece` bytes where a tensor is no larger."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() == 0:
            continue
        group = groups.setdefault((tensor.dtype, tensor.device), [])
        if group and sum(t.nbytes for t in group) + tensor.nbytes > piece:
            yield group.copy()
            group.clear()
        group.append(tensor)
    yield from groups.values()


@dataclass(frozen=True)
class PendingSum:
    """A pending all-reduce."""

    work: Any

    def wait(self) -> None:
        """Wait for the sum; on a GPU the current stream waits, not the host."""
        if self.work is not None:
            self.work.wait()


ALONE = World()
_replicated = _apart = False
_calls = 0  # of this process, of the collectives above


def collective_calls() -> int:
    """The number of collectives that this process has joined, by which a late rank is found."""
    return _calls


def _count_call() -> None:
    global _calls
    _calls += 1


def world() -> World:
    """The processes of torch's default process group; `ALONE` without a group and inside `apart`."""
    if _apart or not (dist.is_available() and dist.is_initialized()):
        return ALONE
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))


def batch_world() -> World:
    """The processes over which the current batch is split; `ALONE` inside `replicated_batch`."""
    return ALONE if _replicated else world()


@contextmanager
def replicated_batch() -> Iterator[None]:
    """Context for a batch that every rank has whole: batch statistics are computed without communication."""
    global _replicated
    before, _replicated = _replicated, True
    try:
        yield
    finally:
        _replicated = before


@contextmanager
def apart() -> Iterator[None]:
    """Context for work of a rank without the others: `world` returns `ALONE`."""
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before
