"""The stages of an augmentation, and the random numbers of each.

A stage draws from numbers that depend on (its kind, seed, epoch, position) only: not on the batch that an
image is in, the process that reads it, or the other stages.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from fastdynat.config import AugmentationConfig
from fastdynat.config.augmentation_policy import PolicySpec, parse_policy
from fastdynat.data.augmentation.crop_shift import CropShift
from fastdynat.data.augmentation.erasing import Cutout, Erasing
from fastdynat.data.augmentation.policies import (
    AutoAugment,
    ColorJitter,
    IdbhColorShape,
    RandAugment,
    TimmRandAugment,
    TrivialAugment,
)
from fastdynat.data.image_sets import DatasetInfo
from fastdynat.data.split import seeded_generator
from fastdynat.ops.image_draws import ImageDraws

TABLE_OF = {"cifar10": "cifar10", "cifar100": "cifar10", "svhn": "svhn"}  # of AutoAugment, by data set


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
    if config.color_jitter:
        stages.append(ColorJitter(config.color_jitter))
    stages += _policy(parse_policy(config.aa), info)
    if config.cutout:
        stages.append(Cutout(config.cutout))
    if config.reprob:
        noise = (info.mean, info.std) if config.remode == "pixel" else None
        stages.append(Erasing(config.reprob, noise=noise))
    return tuple(stages)


def _policy(spec: PolicySpec, info: DatasetInfo) -> list[Stage]:
    """The stages of a policy."""
    if spec.name == "none":
        return []
    if spec.name.startswith("idbh"):
        prob = 1.0 if spec.name == "idbh-strong" else 0.5
        erasing = Erasing(prob, area=(0.02, 0.33), aspect=(0.3, 3.3), kind="erasing of idbh")
        return [CropShift(), IdbhColorShape(), erasing]
    if spec.name == "trivialaugment":
        return [TrivialAugment()]
    if spec.name == "autoaugment":
        return [AutoAugment(spec.table or TABLE_OF.get(info.name, "imagenet"))]
    if spec.name == "randaugment":
        return [RandAugment(spec.operations, int(spec.magnitude))]
    fill = tuple(min(255.0, round(255 * value)) for value in info.mean)
    return [
        TimmRandAugment(
            spec.operations, spec.magnitude, spec.spread, spec.most, spec.increasing, spec.prob, fill
        )
    ]


def apply_stages(
    images: Tensor, stages: Sequence[Stage], positions: Tensor, *, seed: int, epoch: int
) -> Tensor:
    """uint8 images (n, C, H, W) after all `stages`; positions: int64 (n,), theirs in the epoch."""
    for stage in stages:
        number = seeded_generator("augmentation", stage.kind, seed, epoch).initial_seed()
        images = stage.apply(images, ImageDraws.of(number, positions, "cpu"))
    return images
