"""The stages of an augmentation, and the random numbers of each.

A stage draws from numbers that depend on (its kind, seed, epoch, position) only: not on the batch that an
image is in, the process that reads it, or the other stages.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from fastdynat.config import AugmentationConfig
from fastdynat.data.augmentation.erasing import Cutout, Erasing
from fastdynat.data.image_sets import DatasetInfo
from fastdynat.data.split import seeded_generator
from fastdynat.ops.image_draws import ImageDraws


class Stage(Protocol):
    """A change of uint8 images. It holds plain values only, so that worker processes can have it.

    Attributes:
        kind: names the random numbers of the stage; no two stages of a run have the same.
    """

    @property
    def kind(self) -> str: ...

    def apply(self, images: Tensor, draws: ImageDraws) -> Tensor:
        """Return the changed images, uint8 (n, C, H, W) like `images`, which stay as they are.

        draws: of the images' positions in the epoch, on the CPU.
        """


def stages_of(config: AugmentationConfig, info: DatasetInfo) -> tuple[Stage, ...]:
    """The stages that `config` turns on, in order."""
    stages: list[Stage] = []
    if config.cutout:
        stages.append(Cutout(config.cutout))
    if config.reprob:
        noise = (info.mean, info.std) if config.remode == "pixel" else None
        stages.append(Erasing(config.reprob, noise=noise))
    return tuple(stages)


def apply_stages(
    images: Tensor, stages: Sequence[Stage], positions: Tensor, *, seed: int, epoch: int
) -> Tensor:
    """uint8 images (n, C, H, W) after all `stages`; positions: int64 (n,), theirs in the epoch."""
    for stage in stages:
        number = seeded_generator("augmentation", stage.kind, seed, epoch).initial_seed()
        images = stage.apply(images, ImageDraws.of(number, positions, "cpu"))
    return images
