"""Plan of an epoch: all its random draws, and the positions of each step and shard. All loaders follow it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdynat.data.split import seeded_generator
from fastdynat.errors import UserError


@dataclass(frozen=True)
class EpochPlan:
    """Every draw of one epoch. order: int64 (N,), a permutation, or several in a row; by position, not by
    image: shifts, int64 (2, N), are the top and left corner of the crop in the padded image, flips, bool
    (N,), say whether it is mirrored.
    """

    order: Tensor
    shifts: Tensor
    flips: Tensor

    def to(self, device: torch.device) -> "EpochPlan":
        """The same plan on `device`."""
        return EpochPlan(self.order.to(device), self.shifts.to(device), self.flips.to(device))


def plan_epoch(num_images: int, *, pad: int, seed: int, epoch: int, passes: int = 1) -> EpochPlan:
    """Draw the plan of an epoch on the CPU; it depends on the arguments only, and the order not on `pad`.

    With several `passes` over the images the plans of all, one after the other; the first is that of a single
    one.
    """
    if passes > 1:
        plans = [
            _plan_pass(num_images, pad, "epoch", seed, epoch, *([n] if n else [])) for n in range(passes)
        ]
        order, flips = (torch.cat([getattr(plan, name) for plan in plans]) for name in ("order", "flips"))
        return EpochPlan(order, torch.cat([plan.shifts for plan in plans], dim=1), flips)
    return _plan_pass(num_images, pad, "epoch", seed, epoch)


def _plan_pass(num_images: int, pad: int, *key: int | str) -> EpochPlan:
    generator = seeded_generator(*key)
    order = torch.randperm(num_images, generator=generator)
    flips = torch.randint(2, (num_images,), generator=generator, dtype=torch.uint8).bool()
    shifts = torch.randint(2 * pad + 1, (2, num_images), generator=generator)
    return EpochPlan(order, shifts, flips)


class EpochSteps:
    """Cuts the positions of an epoch into steps, and each step into equal shards.

    A step takes `batch_size` positions, shard k of S the k-th S-th of them: the shards of a step, one after
    the other, are the batch that one process would have. The rest of the epoch makes a last, smaller step,
    shortened to a multiple of the number of shards, and is left out if `drop_last`, or if each shard would
    get a single image of it: BatchNorm cannot train on one value per channel. What is left out is the end of
    the permutation: other images in each epoch.

    epoch_steps: steps of an epoch, where that is not one pass; each pass is cut as above, and the last one
        ends early.

    Raises: UserError for a batch size outside [1, num_images] or not divisible by the shards, or a shard that
    is not there.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        drop_last: bool = False,
        num_shards: int = 1,
        shard: int = 0,
        epoch_steps: int | None = None,
    ):
        if not 1 <= batch_size <= num_images:
            raise UserError(
                f"batch size {batch_size} must be between 1 and the number of training images, {num_images}"
            )
        if num_shards < 1 or not 0 <= shard < num_shards:
            raise UserError(f"shard {shard} of {num_shards} is none; shards are numbered from 0")
        if batch_size % num_shards:
            near = batch_size + num_shards - batch_size % num_shards
            raise UserError(
                f"batch size {batch_size} is not divisible by {num_shards} shards; use --batch-size {near}"
            )
        self._batch_size, self._num_shards, self._shard = batch_size, num_shards, shard
        rest = num_images % batch_size // num_shards * num_shards
        if drop_last or rest == num_shards:
            rest = 0
        self._num_images, self._per_pass = num_images, num_images // batch_size * batch_size + rest
        self._pass_steps = -(-self._per_pass // batch_size)
        self.count = self._pass_steps if epoch_steps is None else epoch_steps
        self.passes = -(-self.count // self._pass_steps)
        over = self.count - (self.passes - 1) * self._pass_steps
        self.num_positions = (self.passes - 1) * self._per_pass + min(over * batch_size, self._per_pass)

    def positions(self, step: int) -> slice:
        """The positions that this shard takes in `step`."""
        number, step = divmod(step, self._pass_steps)
        begin = step * self._batch_size
        share = min(self._batch_size, self._per_pass - begin) // self._num_shards
        begin += number * self._num_images + self._shard * share
        return slice(begin, begin + share)
