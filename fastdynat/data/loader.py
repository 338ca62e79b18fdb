"""Loaders: uint8 images to float batches in [0, 1]; order and augmentation depend on (seed, epoch) only."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdynat.data.augmentation import Stage, apply_stages
from fastdynat.data.augmentation.resized_crop import ResizedCrop
from fastdynat.data.batches import Batch
from fastdynat.data.decode import Cut
from fastdynat.data.epoch_plan import EpochPlan, EpochSteps, plan_epoch, plan_order
from fastdynat.data.extra_sampler import ExtendedImages
from fastdynat.data.hugging_face import TableImages
from fastdynat.data.image_sets import Images
from fastdynat.data.imagefolder import FileSet
from fastdynat.data.mixing import Mixing
from fastdynat.errors import UserError, unknown_name
from fastdynat.ops.augment import crop, flip

AUGMENTATIONS = ("none", "crop", "flip", "crop-flip")
PAD_MODES = ("zeros", "reflect")


class PlannedDraws(NamedTuple):
    """The draws of the plan for the images that this process loads in a step.

    Attributes:
        positions: int64 (n,) on the CPU, theirs in the epoch's plan.
        indices: int64 (n,), their numbers in the set.
        shifts, flips: of `EpochPlan`; None for what the augmentation does not use.
        epoch: the plan's.
    """

    positions: Tensor
    indices: Tensor
    shifts: Tensor | None
    flips: Tensor | None
    epoch: int


class PlannedLoader(ABC):
    """Base of the loaders: batches that follow `plan_epoch`, and a state that a resumed run checks.

    A loader for other data or another engine adds `_inputs` only. An epoch may be given up in the middle.

    Args:
        images: The training set. With extra images every batch is full, whatever `drop_last`.
        batch_size: Images of a step over all ranks; at most the number of images.
        augment: "crop-flip", "crop", "flip" or "none".
        pad: Pixels of padding for the crops.
        pad_mode: What the padding holds: "zeros", or "reflect", the image mirrored at its border.
        epoch_steps: Steps of an epoch; None is one pass. More go on with another permutation, as the pass
            before was cut.
        seed: All orders and crops follow from this and the epoch number.
        device: Where the batches are made.
        channels_last: Give the batches in channels-last memory format.
        drop_last: Leave out the partial batch. (A partial batch of one image is always left out: see
            `EpochSteps`.)
        ranks: Processes that share each step.
        rank: Which of them this is.
        parts: Micro-batches that each rank cuts its share into.
        stages: Augmentation after crop and flip.
        mixing: MixUp and CutMix of a batch; None mixes nothing.
        resized_crop: Random resized crop before the flip, instead of a crop of `augment`. Images in files are
            cropped at full size, others as stored, in all loaders.

    Raises: UserError for a batch size above the number of images or too small for the ranks, a negative pad,
        or an unknown augmentation or padding; while reading also for a reflection wider than the image.
    """

    def __init__(
        self,
        images: Images | ExtendedImages,
        *,
        batch_size: int,
        augment: str,
        pad: int = 4,
        pad_mode: str = "zeros",
        epoch_steps: int | None = None,
        seed: int,
        device: torch.device | str,
        channels_last: bool = False,
        drop_last: bool = False,
        ranks: int = 1,
        rank: int = 0,
        parts: int = 1,
        stages: Sequence[Stage] = (),
        mixing: Mixing | None = None,
        resized_crop: ResizedCrop | None = None,
    ) -> None:
        self.num_images, self.extra_sampler = len(images), None
        shares: dict[str, Any] = {"ranks": ranks, "rank": rank, "parts": parts}
        if isinstance(images, ExtendedImages):
            self.extra_sampler = images.sampler(batch_size, seed, epoch_steps)
            self.num_images = self.extra_sampler.originals
            steps = EpochSteps(self.extra_sampler.num_steps * batch_size, batch_size, **shares)
        else:
            steps = EpochSteps(
                len(images), batch_size, drop_last=drop_last, epoch_steps=epoch_steps, **shares
            )
        if augment not in AUGMENTATIONS:
            raise unknown_name("augmentation", augment, AUGMENTATIONS)
        if pad_mode not in PAD_MODES:
            raise unknown_name("pad mode", pad_mode, PAD_MODES)
        if pad < 0:
            raise UserError(f"pad must be 0 or more pixels, got {pad}")
        self._reflects = pad_mode == "reflect" and "crop" in augment
        self.batch_size = batch_size
        self.augment = augment
        self.pad = pad
        self.pad_mode = pad_mode
        self.seed = seed
        self.device = torch.device(device)
        self.channels_last = channels_last
        self.steps_per_epoch = steps.count
        self.epoch_images = steps.num_positions
        self._steps = steps
        self._stages, self._mixing, self._resized_crop = tuple(stages), mixing, resized_crop
        self._cuts_files = resized_crop is not None and isinstance(images, FileSet | TableImages)
        self._host = images
        self._epoch = 0

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of `epoch` from `start_step` on: exactly the tail of what starting at 0 yields.

        Raises: UserError for a start_step outside [0, steps_per_epoch], and for an image that cannot be
        decoded.
        """
        if not 0 <= start_step <= self.steps_per_epoch:
            raise UserError(
                f"start_step {start_step} is outside [0, {self.steps_per_epoch}], the steps of an epoch"
            )
        self._epoch = epoch
        return self._batches(self._plan(epoch), range(start_step, self.steps_per_epoch))

    def _batches(self, plan: EpochPlan, steps: range) -> Iterator[Batch]:
        order, labels = plan.order.to(self.device), self._labels_of(plan.order).to(self.device)
        with closing(self._inputs(plan, steps)) as inputs:
            for step, x in zip(steps, inputs, strict=True):
                rows, share = self._rows(step), self._steps.share(step)
                indices, classes, mixed = order[rows], labels[rows], None
                if self._mixing is not None:
                    blends = self._mixing.blends((self.seed, plan.epoch, step), *x.shape[2:])
                    x, classes, mixed = self._mixing.apply(x, classes, share, blends)
                yield Batch(x, classes, indices[: share.images], share, mixed)

    def _labels_of(self, order: Tensor) -> Tensor:
        images = self._host
        return images.labels_at(order) if isinstance(images, ExtendedImages) else images.labels[order]

    @abstractmethod
    def _inputs(self, plan: EpochPlan, steps: range) -> Generator[Tensor]:
        """Yield `Batch.x` of each of the `steps`."""

    def _draws(self, plan: EpochPlan, step: int) -> PlannedDraws:
        """The draws of the images that this process loads in `step`, on the plan's device."""
        now = self._rows(step)
        positions = torch.arange(now.start, now.stop, now.step) if isinstance(now, slice) else now
        shifts = plan.shifts[:, now] if "crop" in self.augment else None
        flips = plan.flips[now] if "flip" in self.augment else None
        return PlannedDraws(positions, plan.order[now], shifts, flips, plan.epoch)

    def _rows(self, step: int) -> slice | Tensor:
        """The positions in the epoch's plan that this process loads in `step`: those of its share first."""
        own, share = self._steps.positions(step), self._steps.share(step)
        needed = [] if self._mixing is None else self._mixing.needed(share)
        if len(needed) <= share.images:
            return own
        return torch.tensor(needed) + (own.start - share.positions.start)

    def _num_loaded(self, step: int) -> int:
        """Number of images that this process loads in `step`."""
        share = self._steps.share(step)
        return share.images if self._mixing is None else len(self._mixing.needed(share))

    def _read(self, draws: PlannedDraws) -> Tensor:
        """The images of `draws`, uint8 (n, C, H, W) on the CPU; those in files cut already."""
        if isinstance(self._host, FileSet | TableImages) and self._cuts_files:
            return self._host.read(draws.indices, self._cuts(draws))
        return self._host.read(draws.indices)

    def _cuts(self, draws: PlannedDraws) -> list[Cut]:
        """The part of each image that the resized crop takes."""
        assert self._resized_crop is not None
        return self._resized_crop.cuts(draws.positions, seed=self.seed, epoch=draws.epoch)

    def _augmented(self, images: Tensor, draws: PlannedDraws) -> Tensor:
        """uint8 (n, C, H, W) cropped, flipped and through all stages, on their device."""
        if self._resized_crop is not None and not self._cuts_files:
            images = self._resized_crop.apply(images, self._cuts(draws))
        shifts, flips = (None if drawn is None else drawn.to(images.device) for drawn in draws[2:4])
        images = images if shifts is None else crop(images, shifts, self.pad, pad_mode=self.pad_mode)
        return self._staged(images if flips is None else flip(images, flips), draws)

    def _staged(self, images: Tensor, draws: PlannedDraws) -> Tensor:
        """uint8 (n, C, H, W) through all stages."""
        return apply_stages(images, self._stages, draws.positions, seed=self.seed, epoch=draws.epoch)

    def _plan(self, epoch: int) -> EpochPlan:
        if self.extra_sampler is not None:
            return plan_order(self.extra_sampler.order(epoch), pad=self.pad, seed=self.seed, epoch=epoch)
        return plan_epoch(
            self.num_images, pad=self.pad, seed=self.seed, epoch=epoch, passes=self._steps.passes
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the seed, the epoch last begun, its permutation, the sizes and two checksums of the data.

        Ints and one int64 tensor (num_images,), so that torch.load opens it with weights_only=True. The same
        for every rank, and for every loader of the same `Images`.
        """
        return {
            "seed": self.seed,
            "epoch": self._epoch,
            "num_images": self.num_images,
            "batch_size": self.batch_size,
            "epoch_images": self.epoch_images,
            "checksum": self._checksum,
            "content": self._content,
            "extra": self._extra_state(),
            "permutation": self._plan(self._epoch).order,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the epoch of `state`; call `epoch(state["epoch"], start_step)` to go on.

        Raises: UserError where this loader would not continue the same batches: other data, batch size or
        seed.
        """
        compared = {
            "num_images": "training images",
            "batch_size": "batch size",
            "seed": "data seed",
            "epoch_images": "images per epoch",
        }
        for key, what in compared.items():
            if state[key] != getattr(self, key):
                raise UserError(
                    f"the checkpoint has {what} {state[key]}, this run has {getattr(self, key)}; resume with "
                    f"the same"
                )
        if state.get("extra") != self._extra_state():
            raise UserError(
                f"the checkpoint was made with other extra data ({state.get('extra') or 'none'}; now "
                f"{self._extra_state() or 'none'}); resume with the same --extra-data"
            )
        if state["checksum"] != self._checksum:
            raise UserError(
                "the checkpoint was made with other training data; resume with the same --data and --data-dir"
            )
        if state.get("content", self._content) != self._content:  # earlier versions stored none
            raise UserError(
                "the files of the training images have the names that they had for the checkpoint, but other "
                "content; restore them, or start a new run"
            )
        if not torch.equal(state["permutation"].cpu(), self._plan(state["epoch"]).order):
            raise UserError(
                f"the checkpoint's order of epoch {state['epoch']} is not what seed {self.seed} gives here; "
                "resume with the same seed and PyTorch version"
            )
        self._epoch = state["epoch"]

    def _extra_state(self) -> dict[str, Any] | None:
        """The facts about the extra images for a checkpoint; None where there are none."""
        if self.extra_sampler is None:
            return None
        assert isinstance(self._host, ExtendedImages)
        return self.extra_sampler.about() | {"checksum": self._host.extra.checksum}

    @cached_property
    def _checksum(self) -> int:
        return self._host.checksum()

    @cached_property
    def _content(self) -> int:
        return self._host.content()
