"""Flags of the augmentation beyond crop and flip, and of mixed images."""

from dataclasses import dataclass
from typing import Literal

from fastdynat.config.augmentation_policy import parse_policy


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """Augmentation beyond --augment, in the order: crop (also --scale) and flip, --color-jitter, --aa,
    --cutout, --reprob, then --mixup or --cutmix of the batch."""

    scale: tuple[float, ...] = ()
    """Random resized crops in place of those of --augment: the least and the largest part of the image's
    area, such as 0.08 1. Of images in files, parts of the whole image are taken. Empty is off."""
    ratio: tuple[float, ...] = (3 / 4, 4 / 3)
    """Least and largest width over height of random resized crops."""
    color_jitter: float = 0.0
    """Change brightness, contrast and saturation, each by a random factor of 1 - this to 1 + this, in random
    order; 0 is off."""
    aa: str = "none"
    """Augmentation policy: randaugment:N:M (torchvision's, N operations of magnitude M out of 30),
    trivialaugment, autoaugment or autoaugment:cifar10|imagenet|svhn, rand-m9-mstd0.5-inc1 (timm's),
    idbh-weak or idbh-strong."""
    cutout: int = 0
    """Set a square of this many pixels per side, centred at a random pixel, to black in every training image
    (DeVries and Taylor); 0 is off."""
    reprob: float = 0.0
    """Share of the training images in which a random rectangle is erased; 0 is off."""
    remode: Literal["pixel", "const"] = "pixel"
    """Filling of erased rectangles: normal noise of the data's mean and standard deviation, or black."""
    mixup: float = 0.0
    """Alpha of MixUp: each image of a batch is blended with another one, with a weight from
    Beta(alpha, alpha), and so are their labels; 0 is off."""
    cutmix: float = 0.0
    """Alpha of CutMix: each image of a batch gets a box of another one, of an area from Beta(alpha, alpha),
    and of its label; 0 is off."""
    mixup_prob: float = 1.0
    """Probability of mixing a batch at all."""
    mixup_switch_prob: float = 0.5
    """Probability of CutMix instead of MixUp where both are on."""
    mixup_groups: int = 1
    """Cut each batch into this many groups, each with a weight and a box of its own. The batch of Wang et al.
    (2023) has four."""

    @property
    def crops(self) -> str:
        """The flag that crops the images in place of --augment, as "aa idbh-weak"; empty if none does."""
        scale = " ".join(f"{end:g}" for end in self.scale)
        return f"scale {scale}" if scale else f"aa {self.aa}" * parse_policy(self.aa).own_crop

    @property
    def mixing(self) -> str:
        """The flag that mixes images and their labels, as "mixup 0.8"; empty if none does."""
        on = (key for key in ("mixup", "cutmix") if getattr(self, key))
        return next((f"{key} {getattr(self, key):g}" for key in on), "")
