"""A measurement by all processes of the world: each attacks its share of the images."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from fastdynat.attacks import NamedAttack
from fastdynat.distributed import World, all_can, apart, world
from fastdynat.evaluation.halving import with_halving
from fastdynat.evaluation.measure import Stopped
from fastdynat.evaluation.outcome import Measurement, unpack_bits, zero_gradients

T = TypeVar("T")
# `measure` of a network under an attack, given the images to attack, (N,) bool or None, and a batch size.
Run = Callable[[Tensor | None, int], Measurement]


def measure_on_ranks(
    run: Run,
    attack: NamedAttack,
    labels: Tensor,
    *,
    batch_size: int,
    standing: Tensor | None = None,
) -> Measurement:
    """`run` on the images that are `standing`, dealt out to the ranks; the same measurement on every rank.

    Of M images to attack, rank r of W takes numbers r, r + W, r + 2 W, ..., so the stages of a sequence of
    attacks are dealt out anew as images fall. An attack whose result depends on the batch
    (`NamedAttack.draws_per_image`) takes the batches of one process, batch b on rank b mod W. The result is
    that of one process, up to the rounding of the network. Every rank must call this, with the same
    arguments. While a rank attacks, nothing is communicated, and the others wait for it without a limit.

    Args:
        run: given the images that this rank is to attack and their batch size, which halves where memory runs
            out.
        labels: (N,) int64 of all images.
        batch_size: largest number of images per batch on a rank.
        standing: (N,) bool: attack only these images; None is all.

    Returns:
        With the seconds of the slowest rank and the smallest batch size.

    Raises:
        Stopped: it was raised on a rank; on all ranks.
        UserError: `run` raised one; on the lowest such rank, and ToldElsewhere on the others.
    """
    here = world()
    if here.alone:
        return with_halving(partial(run, standing), batch_size)
    rows = torch.arange(len(labels)) if standing is None else standing.nonzero().squeeze(1)
    while True:
        dealt = [_share(rows, rank, here, attack, batch_size) for rank in range(here.size)]
        parts = _gathered(run, attack, dealt, len(labels), batch_size)
        size = min(
            (p.batch_size for p, own in zip(parts, dealt, strict=True) if len(own)), default=batch_size
        )
        if attack.draws_per_image or size == batch_size:
            return _united(parts, dealt, rows, labels)
        batch_size = size  # of one process, which would have started again with this size


def _share(rows: Tensor, rank: int, world: World, attack: NamedAttack, batch_size: int) -> Tensor:
    """The `rows` (M,) that `rank` attacks."""
    if attack.draws_per_image:
        return rows[rank :: world.size]
    return torch.cat([rows[:0], *rows.split(batch_size)[rank :: world.size]])


def on_all_ranks(run: Callable[[], T]) -> list[T]:
    """``run()`` of every rank on its own; picklable results in the order of the ranks.

    The ranks wait for each other without a limit.

    Raises:
        Stopped: it was raised on a rank; on all ranks.
        UserError: `run` raised one; on the lowest such rank, and ToldElsewhere on the others.
    """

    def attempt() -> list[T]:
        try:
            with apart():
                return [run()]
        except Stopped:
            return []

    found = world().gather(all_can(attempt))
    if not all(found):
        raise Stopped
    return [result for (result,) in found]


def _gathered(
    run: Run, attack: NamedAttack, dealt: list[Tensor], images: int, batch_size: int
) -> list[Measurement]:
    """The ranks' measurements, each of its rows in `dealt`."""
    own = dealt[world().rank]
    mask = torch.zeros(images, dtype=torch.bool)
    mask[own] = True
    size = max(1, min(batch_size, len(own))) if attack.draws_per_image else batch_size
    return on_all_ranks(lambda: with_halving(partial(run, mask), size))


def _united(parts: list[Measurement], dealt: list[Tensor], rows: Tensor, labels: Tensor) -> Measurement:
    """The measurement of `rows`, of which rank r has measured those in ``dealt[r]``."""
    robust = torch.zeros(len(labels), dtype=torch.bool)
    distances = torch.zeros(len(labels), dtype=torch.float64)
    for part, own in zip(parts, dealt, strict=True):
        robust[own] = unpack_bits(part.robust_bits, part.images)[own]
        if part.distances:
            distances[own] = torch.tensor([float("inf") if d is None else d for d in part.distances]).double()
    share, gradients = zero_gradients(parts)
    return Measurement.of(
        parts[0].attack,
        robust,
        labels,
        classes=int(labels.max()) + 1,
        seconds=max(part.seconds for part in parts),
        batch_size=min((p.batch_size for p, own in zip(parts, dealt, strict=True) if len(own)), default=1),
        zero_grad_share=share,
        gradients=gradients,
        distances=distances[rows] if any(part.distances is not None for part in parts) else None,
        attacked=len(rows),
    )
