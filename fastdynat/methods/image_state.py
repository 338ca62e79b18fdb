"""Buffers with a row per training image, which follow the image from one of its batches to the next.

A method makes them in `make_buffers`, with `Method.num_images` rows. Row n belongs to image number n
(`Batch.indices`), however it is augmented. Every rank holds all rows, because images are dealt out anew in
each epoch: `store_rows` writes the rows of the whole batch on every rank, by one collective. So a checkpoint
of any rank holds them all, and a run may resume on another number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fastdynat.data import Batch
from fastdynat.distributed import world
from fastdynat.distributed.shares import Share

MOST_LEVELS = 127  # of int8, on each side of 0


def rows_of(buffer: Tensor, batch: Batch) -> Tensor:
    """The rows of the images of `batch`, (N, ...); a copy."""
    return buffer.index_select(0, batch.indices)


def store_rows(buffers: Mapping[str, Tensor], rows: Mapping[str, Tensor], batch: Batch) -> None:
    """Write the `rows` of the images of `batch` in place into the buffers of these names, on every rank.

    Every rank must call it. No image may be in the batch twice.

    rows: (N, ...) in the dtypes of the buffers.
    """
    with torch.no_grad():
        indices, given = _of_all_ranks([batch.indices, *rows.values()], batch.share)
        for name, values in zip(rows, given, strict=True):
            buffers[name].index_copy_(0, indices, values)


def _of_all_ranks(rows: list[Tensor], share: Share) -> tuple[Tensor, list[Tensor]]:
    """The `rows` of all ranks' shares of a batch, in the order of the ranks; the first ones apart."""
    here = world()
    if not here.alone and share.replicated:
        rows = [tensor.contiguous() for tensor in rows]
        here.broadcast_(rows)  # which all have computed, but not all on the same hardware
    elif not here.alone:
        counts = [replace(share, rank=rank).images for rank in range(share.ranks)]
        packed = torch.cat([_bytes(tensor) for tensor in rows], dim=1)
        own = packed.new_zeros(max(counts), packed.shape[1])
        own[: len(packed)] = packed
        held = packed.new_empty(len(counts), own.numel())
        here.gather_rows_(held, own.flatten())
        parts = held.view(len(counts), *own.shape)
        whole = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
        columns = whole.split([_bytes(tensor).shape[1] for tensor in rows], dim=1)
        rows = [_like(column, tensor) for column, tensor in zip(columns, rows, strict=True)]
    return rows[0], rows[1:]


def _bytes(rows: Tensor) -> Tensor:
    """(N, bytes of a row), uint8."""
    return rows.contiguous().view(len(rows), -1).view(torch.uint8)


def _like(rows: Tensor, of: Tensor) -> Tensor:
    """The rows that `_bytes` turned into `rows`, in dtype and shape those of `of`."""
    return rows.clone(memory_format=torch.contiguous_format).view(of.dtype).view(len(rows), *of.shape[1:])


def perturbation_rows(x: Tensor, images: int) -> dict[str, Tensor]:
    """Buffers for perturbations of so many `images` of the shape of those in `x` (N, ...), on its device.

    `delta` holds them as `to_int8` does; `period` the number of the period that they are of, -1 before the
    first one; `present_period` is that of now (`begin_period`).
    """
    return {
        "delta": x.new_zeros(images, *x.shape[1:], dtype=torch.int8),
        "period": x.new_full((images,), -1, dtype=torch.int32),
        "present_period": x.new_zeros((), dtype=torch.int32),
    }


def begin_period(buffers: Mapping[str, Tensor], number: int) -> None:
    """Make all perturbations of earlier periods count as missing (`is_missing`)."""
    buffers["present_period"].fill_(number)


def is_missing(buffers: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """(N, 1, 1, 1) bool: images of `batch` that have no perturbation of the present period yet.

    With --epoch-steps an image need not come in the first epoch of a period.
    """
    missing = rows_of(buffers["period"], batch) != buffers["present_period"]
    return missing.view(-1, 1, 1, 1)


def store_perturbations(
    buffers: Mapping[str, Tensor], delta: Tensor, eps: float, batch: Batch, **others: Tensor
) -> None:
    """Store `delta` (N, ...), perturbations in [-eps, eps], and rows of `others` by `store_rows`."""
    period = buffers["present_period"].expand(len(delta))
    store_rows(buffers, {"delta": to_int8(delta, eps), "period": period, **others}, batch)


def levels(eps: float) -> int:
    """The levels of int8 on each side of 0 that hold perturbations of at most `eps`.

    If eps is a whole number k of pixel levels 1 / 255, so are the perturbations of 8-bit images by steps of
    eps, which a multiple of k levels represents exactly. Others are rounded, by at most eps / 254.
    """
    pixels = round(255 * eps)
    whole = 1 <= pixels <= MOST_LEVELS and abs(255 * eps - pixels) < 1e-4
    return MOST_LEVELS // pixels * pixels if whole else MOST_LEVELS


def to_int8(delta: Tensor, eps: float) -> Tensor:
    """Perturbations in [-eps, eps] as int8, rounded to the nearest multiple of eps / `levels`."""
    n = levels(eps)
    return (delta * (n / eps)).round_().clamp_(-n, n).to(torch.int8)


def from_int8(stored: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The perturbations that `to_int8` stored; plus and minus eps come back exactly."""
    return (stored.to(dtype) / levels(eps)) * eps


def to_float16(values: Tensor) -> Tensor:
    """`values` in float16, limited to its largest number."""
    most = torch.finfo(torch.float16).max
    return values.clamp(-most, most).to(torch.float16)
