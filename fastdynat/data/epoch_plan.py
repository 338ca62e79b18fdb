"""Plan of an epoch: all its random draws, and the positions of each step and rank. All loaders follow it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdynat.data.split import seeded_generator
from fastdynat.distributed.shares import LEAST, Share, deal
from fastdynat.errors import UserError


@dataclass(frozen=True)
class EpochPlan:
    """Every draw of one epoch. order: int64 (N,), a permutation, or several in a row; by position, not by
    image: shifts, int64 (2, N), are the top and left corner of the crop in the padded image, flips, bool
    (N,), say whether it is mirrored. Stages and mixing draw by (seed, epoch, position) when they need it.
    """

    order: Tensor
    shifts: Tensor
    flips: Tensor
    epoch: int

    def to(self, device: torch.device) -> "EpochPlan":
        """The same plan on `device`."""
        return EpochPlan(self.order.to(device), self.shifts.to(device), self.flips.to(device), self.epoch)


def plan_epoch(num_images: int, *, pad: int, seed: int, epoch: int, passes: int = 1) -> EpochPlan:
    """Draw the plan of an epoch on the CPU; it depends on the arguments only, and the order not on `pad`.

    With several `passes` over the images the plans of all, one after the other; the first is that of a single
    one.
    """
    if passes > 1:
        plans = [_plan_pass(num_images, pad, seed, epoch, n) for n in range(passes)]
        order, flips = (torch.cat([getattr(plan, name) for plan in plans]) for name in ("order", "flips"))
        return EpochPlan(order, torch.cat([plan.shifts for plan in plans], dim=1), flips, epoch)
    return _plan_pass(num_images, pad, seed, epoch, 0)


def plan_order(order: Tensor, *, pad: int, seed: int, epoch: int) -> EpochPlan:
    """Draw the plan of an epoch that takes the images in `order` (`ExtraSampler.order`) as it is."""
    generator = seeded_generator("augmentation of extended batches", seed, epoch)
    flips = torch.randint(2, (len(order),), generator=generator, dtype=torch.uint8).bool()
    return EpochPlan(order, torch.randint(2 * pad + 1, (2, len(order)), generator=generator), flips, epoch)


def _plan_pass(num_images: int, pad: int, seed: int, epoch: int, number: int) -> EpochPlan:
    generator = seeded_generator("epoch", seed, epoch, *([number] if number else []))
    order = torch.randperm(num_images, generator=generator)
    flips = torch.randint(2, (num_images,), generator=generator, dtype=torch.uint8).bool()
    shifts = torch.randint(2 * pad + 1, (2, num_images), generator=generator)
    return EpochPlan(order, shifts, flips, epoch)


class EpochSteps:
    """Cuts the positions of an epoch into steps, and deals each step out to the ranks (`shares.deal`).

    A step takes `batch_size` positions, whatever the number of ranks. The rest of the epoch makes a last,
    smaller step, and is left out if `drop_last`, or if it is a single image: BatchNorm cannot train on one
    value per channel. What is left out is the end of the permutation: other images in each epoch.

    epoch_steps: steps of an epoch, where that is not one pass; each pass is cut as above, and the last one
        ends early.
    ranks, rank: processes that share each step, and which of them this is.
    parts: micro-batches that each rank cuts its share into.

    Raises: UserError for a batch size above num_images, or too small for the ranks and parts.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        drop_last: bool = False,
        ranks: int = 1,
        rank: int = 0,
        parts: int = 1,
        epoch_steps: int | None = None,
    ):
        if not 1 <= batch_size <= num_images:
            raise UserError(
                f"batch size {batch_size} must be between 1 and the number of training images, {num_images}"
            )
        if not 0 <= rank < ranks:
            raise UserError(f"there is no rank {rank} of {ranks}; ranks are numbered from 0")
        check_shares(batch_size, ranks, parts)
        self._batch_size, self._ranks, self._rank, self._parts = batch_size, ranks, rank, parts
        rest = num_images % batch_size
        if drop_last or rest == 1:
            rest = 0
        self._num_images, self._per_pass = num_images, num_images // batch_size * batch_size + rest
        self._pass_steps = -(-self._per_pass // batch_size)
        self.count = self._pass_steps if epoch_steps is None else epoch_steps
        self.passes = -(-self.count // self._pass_steps)
        over = self.count - (self.passes - 1) * self._pass_steps
        self.num_positions = (self.passes - 1) * self._per_pass + min(over * batch_size, self._per_pass)

    def share(self, step: int) -> Share:
        """This rank's share of the batch of `step`."""
        begin = step % self._pass_steps * self._batch_size
        total = min(self._batch_size, self._per_pass - begin)
        return deal(total, self._rank, self._ranks, self._parts)

    def positions(self, step: int) -> slice:
        """The positions in the epoch's plan that this rank takes in `step`."""
        number, share = step // self._pass_steps, self.share(step)
        begin = number * self._num_images + step % self._pass_steps * self._batch_size
        own = share.positions
        return slice(begin + own.start, begin + own.stop, own.step)


def check_shares(batch_size: int, ranks: int, parts: int = 1) -> None:
    """Raise UserError for a batch that does not give each micro-batch of each rank two images."""
    least = LEAST * ranks * parts
    if ranks * parts == 1 or batch_size >= least:
        return
    shared = [f"{ranks} processes"] * (ranks > 1) + [f"--grad-accum-steps {parts}"] * (parts > 1)
    raise UserError(
        f"batch size {batch_size} is the global one and too small for {' and '.join(shared)}, which need at "
        f"least {LEAST} images each; use --batch-size {least} or more"
    )
