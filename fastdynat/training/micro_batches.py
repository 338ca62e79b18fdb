"""Micro-batches of --grad-accum-steps: the parts of a batch, their rows of a method's tensors, their logs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastdynat.attack_engine.engine import Attacker
from fastdynat.attacks import AttackResult
from fastdynat.data import Batch
from fastdynat.distributed import World
from fastdynat.distributed.shares import Share
from fastdynat.methods import Inner, Method


@dataclass
class MicroBatch:
    """A part of a batch on its way through an update.

    Attributes:
        rows: context in which the method's buffers are those of its images.
        last: no part follows.
        weight: of its losses in those of the update, beside its share of the images.
        inner, attacked, logs: set one after the other.
    """

    batch: Batch
    attack: Attacker
    rows: Callable[[], AbstractContextManager[None]]
    last: bool
    weight: float = 1.0
    inner: Inner = field(init=False)
    attacked: AttackResult = field(init=False)
    logs: dict[str, Tensor] = field(init=False)


def shared_loss(loss: Tensor, part: MicroBatch) -> Tensor:
    """A mean over the images of `part` as its share of the mean over the global batch."""
    weight = part.batch.share.weight * part.weight
    return loss if weight == 1 else loss * weight


def micro_batches(batch: Batch, count: int) -> list[tuple[Batch, slice]]:
    """The micro-batches of `batch` (`Share.pieces`), each with its rows in it."""
    found, row = [], 0
    for share in batch.share.pieces(count):
        rows = slice(row, row + share.images)
        found.append((batch.rows(rows, share), rows))
        row = rows.stop
    return found


@contextmanager
def buffer_rows(
    method: Method[Any], names: set[str], rows: slice, share: Share, world: World
) -> Iterator[None]:
    """Context in which the buffers `names` of `method` are the `rows` of a micro-batch of `share`.

    Row i on rank r of W belongs to position r + W i of the batch. For a batch that every rank has whole, the
    rows of its positions are brought together, and each rank takes its own ones back.
    """
    whole, replicated = method.buffers, share.replicated
    if not names:
        yield
        return
    used = {
        name: _rows_of_all(whole[name], share.total, world) if replicated else whole[name] for name in names
    }
    method.buffers = whole | {name: buffer[rows] for name, buffer in used.items()}
    try:
        yield
        for name in names if replicated else ():
            own = used[name][world.rank :: world.size]
            whole[name][: len(own)].copy_(own)
    finally:
        method.buffers = whole


def _rows_of_all(buffer: Tensor, images: int, world: World) -> Tensor:
    """The rows of positions 0 to `images`, of which each rank has every W-th."""
    rows = buffer.new_zeros(images, *buffer.shape[1:])
    own = rows[world.rank :: world.size]
    own.copy_(buffer[: len(own)])
    return world.sum_(rows)


def joined_logs(logs: Sequence[dict[str, Tensor]], parts: Sequence[Batch]) -> dict[str, Tensor]:
    """Means over the batch from means over its `parts`; what a part does not log counts as 0 there."""
    if len(parts) == 1:
        return logs[0]
    images = sum(part.share.images for part in parts)
    shares = [part.share.images / images for part in parts]
    joined: dict[str, Tensor] = {}
    for share, log in zip(shares, logs, strict=True):
        for key, value in log.items():
            term = share * value.double()
            joined[key] = joined[key] + term if key in joined else term
    return joined
