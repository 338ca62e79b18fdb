"""Shares of a measurement, made by several processes, put together again."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fastdynat.commands.evaluate.measurement_store import Key, standing_digest
from fastdynat.commands.evaluate.settle import Shard
from fastdynat.evaluation.outcome import Measurement, unpack_bits, zero_gradients


def unite(
    key: Key,
    counts: list[int],
    find: Callable[[Key], Measurement | None],
    labels: Tensor,
    standing: Tensor | None,
) -> Measurement | None:
    """The measurement of all images, from the first complete division into `counts` shards.

    Args:
        key: of all images.
        find: a shard's measurement, if it is there.
        labels: (N,) of all images.
        standing: which of them are attacked; None is all.
    """
    for count in counts:
        parts = []
        for shard in (Shard(index, count) for index in range(1, count + 1)):
            attacked = None if standing is None else standing[shard.rows]
            part = find(replace(key, shard=str(shard), standing=standing_digest(attacked)))
            if part is None:
                break
            parts.append(part)
        else:
            return _union(parts, labels, None if standing is None else int(standing.sum()))
    return None


def _union(parts: list[Measurement], labels: Tensor, attacked: int | None) -> Measurement:
    robust = torch.zeros(len(labels), dtype=torch.bool)
    distances = torch.zeros(len(labels)) if parts[0].distances is not None else None
    for index, part in enumerate(parts, 1):
        rows = Shard(index, len(parts)).rows
        robust[rows] = unpack_bits(part.robust_bits, part.images)
        if distances is not None and part.distances is not None:
            distances[rows] = torch.tensor([float("inf") if d is None else d for d in part.distances])
    share, gradients = zero_gradients(parts)
    return Measurement.of(
        parts[0].attack,
        robust,
        labels,
        classes=int(labels.max()) + 1,
        seconds=sum(part.seconds for part in parts),
        batch_size=min(part.batch_size for part in parts),
        zero_grad_share=share,
        gradients=gradients,
        distances=distances,
        attacked=attacked,
    )
