"""Batches of images that stay on the device."""

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from fastdynat import ops
from fastdynat.data.epoch_plan import EpochPlan
from fastdynat.data.extra_sampler import ExtendedImages
from fastdynat.data.image_sets import ImageSet
from fastdynat.data.loader import PlannedLoader
from fastdynat.ops.augment import reflect, to_unit


class ResidentLoader(PlannedLoader):
    """Shuffle and augment a set that stays on the device as uint8; no worker processes, no per-image Python.

    The images are copied to the device once; a batch is one pass of `ops.augment`, or several operations
    where there are stages. With crops of reflected images and no stages they are kept with their reflection
    around them, (H + 2 pad) (W + 2 pad) / (H W) times the memory: the operator pads those with zeros once
    more, and no zero is in the middle of its crop. Arguments: `PlannedLoader`.
    """

    def __init__(self, images: ImageSet | ExtendedImages, **options: Any) -> None:
        super().__init__(images, **options)
        if isinstance(images, ExtendedImages):
            stored = images.stored(self.device)
        else:
            stored = images.images.to(self.device).contiguous()
        self._fused = not self._stages and self._resized_crop is None
        self._padded = self._reflects and self._fused
        self._images = reflect(stored, self.pad) if self._padded else stored

    def _inputs(self, plan: EpochPlan, steps: range) -> Generator[Tensor]:
        plan = plan.to(self.device)
        for step in steps:
            draws = self._draws(plan, step)
            if not self._fused:
                images = self._augmented(self._images[draws.indices], draws)
                yield to_unit(images, channels_last=self.channels_last)
                continue
            taken = draws.indices, draws.shifts, draws.flips
            x = ops.augment(self._images, *taken, pad=self.pad, channels_last=self.channels_last)
            yield self._middle(x) if self._padded else x

    def _middle(self, x: Tensor) -> Tensor:
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        inside = slice(self.pad, -self.pad) if self.pad else slice(None)
        return x[..., inside, inside].contiguous(memory_format=layout)
