"""Loaders: uint8 images to float batches in [0, 1]; shuffling and augmentation depend on (seed, epoch) only."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastdynat import ops
from fastdynat.data.split import seeded_generator
from fastdynat.data.store import ImageSet
from fastdynat.errors import UserError, unknown_name
from fastdynat.ops.augment import to_unit

AUGMENTATIONS = ("none", "crop", "flip", "crop-flip")


@dataclass
class Batch:
    """x: float32 (N, C, H, W) in [0, 1]. labels: int64 (N,). indices: int64 (N,) into the set. All on one device."""

    x: Tensor
    labels: Tensor
    indices: Tensor


class TrainLoader(Protocol):
    """What the training loop asks of a loader."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches that `epoch` yields from step 0."""

    @property
    def num_images(self) -> int:
        """Number of images in the set."""

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from `start_step` on, the same ones however often and wherever it starts."""

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers and tensors that identify the data and the order of the current epoch."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that this loader continues where `state` was taken; raises UserError where it would not."""


@dataclass(frozen=True)
class EpochPlan:
    """Every draw of one epoch. order: int64 (N,) permutation; by position, not by image: shifts, int64 (2, N), are the
    top and left corner of the crop in the padded image, flips, bool (N,), say whether it is mirrored."""

    order: Tensor
    shifts: Tensor
    flips: Tensor


def plan_epoch(num_images: int, *, pad: int, seed: int, epoch: int) -> EpochPlan:
    """Draw the plan of an epoch on the CPU; it depends on the arguments only, and the order not on `pad`."""
    generator = seeded_generator("epoch", seed, epoch)
    order = torch.randperm(num_images, generator=generator)
    flips = torch.randint(2, (num_images,), generator=generator, dtype=torch.uint8).bool()
    shifts = torch.randint(2 * pad + 1, (2, num_images), generator=generator)
    return EpochPlan(order, shifts, flips)


class ResidentLoader:
    """Shuffle and augment a set that stays on the device as uint8; no worker processes, no per-image Python.

    An epoch ends with the partial batch, unless `drop_last`, or unless that batch is a single image: BatchNorm cannot
    train on one value per channel, so this one image is left out, a different one each epoch.

    Args:
        images: The training set; copied to the device once.
        batch_size: At most the number of images.
        augment: "crop-flip", "crop", "flip" or "none". Crops are of zero-padded images.
        pad: Pixels of padding for the crops.
        seed: All orders and crops follow from this and the epoch number.
        device: Where the batches are made.
        channels_last: Give the batches in channels-last memory format.
        drop_last: Leave out the partial batch.

    Raises: UserError for a batch size outside [1, number of images], a negative pad, or an unknown augmentation.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        batch_size: int,
        augment: str,
        pad: int = 4,
        seed: int,
        device: torch.device | str,
        channels_last: bool = False,
        drop_last: bool = False,
    ) -> None:
        if not 1 <= batch_size <= len(images):
            raise UserError(f"batch size {batch_size} must be between 1 and the number of training images, {len(images)}")
        if augment not in AUGMENTATIONS:
            raise unknown_name("augmentation", augment, AUGMENTATIONS)
        if pad < 0:
            raise UserError(f"pad must be 0 or more pixels, got {pad}")
        self.batch_size = batch_size
        self.augment = augment
        self.pad = pad
        self.seed = seed
        self.device = torch.device(device)
        self.channels_last = channels_last
        self.num_images = len(images)
        rest = self.num_images % batch_size
        self._epoch_images = self.num_images - rest if drop_last or rest == 1 else self.num_images
        self.steps_per_epoch = -(-self._epoch_images // batch_size)
        self._host = images
        self._images = images.images.to(self.device).contiguous()
        self._labels = images.labels.to(self.device)
        self._epoch = 0
        self._checksum: int | None = None

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of `epoch` from `start_step` on: exactly the tail of what starting at 0 yields.

        Raises: UserError for a start_step outside [0, steps_per_epoch].
        """
        if not 0 <= start_step <= self.steps_per_epoch:
            raise UserError(f"start_step {start_step} is outside [0, {self.steps_per_epoch}], the steps of an epoch")
        self._epoch = epoch
        return self._batches(self._plan(epoch), start_step)

    def _batches(self, plan: EpochPlan, start_step: int) -> Iterator[Batch]:
        order, shifts, flips = (part.to(self.device) for part in (plan.order, plan.shifts, plan.flips))
        for step in range(start_step, self.steps_per_epoch):
            now = slice(step * self.batch_size, min((step + 1) * self.batch_size, self._epoch_images))
            indices = order[now]
            x = ops.augment(
                self._images,
                indices,
                shifts[:, now] if "crop" in self.augment else None,
                flips[now] if "flip" in self.augment else None,
                pad=self.pad,
                channels_last=self.channels_last,
            )
            yield Batch(x, self._labels[indices], indices)

    def _plan(self, epoch: int) -> EpochPlan:
        return plan_epoch(self.num_images, pad=self.pad, seed=self.seed, epoch=epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the seed, the epoch last begun, its permutation, the sizes and a checksum of the data.

        Ints and one int64 tensor (num_images,), so that torch.load opens it with weights_only=True.
        """
        return {
            "seed": self.seed,
            "epoch": self._epoch,
            "num_images": self.num_images,
            "batch_size": self.batch_size,
            "checksum": self._data_checksum(),
            "permutation": self._plan(self._epoch).order,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the epoch of `state`; call `epoch(state["epoch"], start_step)` to go on.

        Raises: UserError where this loader would not continue the same batches: other data, batch size or seed.
        """
        for key, what in (("num_images", "training images"), ("batch_size", "batch size"), ("seed", "data seed")):
            if state[key] != getattr(self, key):
                raise UserError(
                    f"the checkpoint has {what} {state[key]}, this run has {getattr(self, key)}; resume with the same"
                )
        if state["checksum"] != self._data_checksum():
            raise UserError("the checkpoint was made with other training data; resume with the same --data and --data-dir")
        if not torch.equal(state["permutation"].cpu(), self._plan(state["epoch"]).order):
            raise UserError(
                f"the checkpoint's order of epoch {state['epoch']} is not what seed {self.seed} gives here; "
                "resume with the same seed and PyTorch version"
            )
        self._epoch = state["epoch"]

    def _data_checksum(self) -> int:
        if self._checksum is None:
            labels = zlib.crc32(self._host.labels.contiguous().numpy().data)
            self._checksum = zlib.crc32(self._host.images.contiguous().numpy().data, labels)
        return self._checksum


def eval_batches(
    images: ImageSet,
    *,
    batch_size: int,
    device: torch.device | str,
    limit: int | None = None,
    channels_last: bool = False,
) -> Iterator[Batch]:
    """Yield the first `limit` images (all if None) in order and without augmentation; the last batch may be smaller.

    Raises: UserError for a batch size or limit below 1.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise UserError(f"batch size and limit must be at least 1, got {batch_size} and {limit}")
    count = len(images) if limit is None else min(limit, len(images))

    def batch(start: int) -> Batch:
        stop = min(start + batch_size, count)
        pixels = images.images[start:stop].to(device, non_blocking=True)
        labels = images.labels[start:stop].to(device, non_blocking=True)
        return Batch(to_unit(pixels, channels_last=channels_last), labels, torch.arange(start, stop, device=device))

    return (batch(start) for start in range(0, count, batch_size))
