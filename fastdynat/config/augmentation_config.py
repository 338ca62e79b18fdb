"""Flags of the augmentation beyond crop and flip, and of mixed images."""

from dataclasses import dataclass
from typing import Literal

from fastdynat.config.augmentation_policy import parse_policy


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """Augmentation beyond --augment, applied in this order: --augment or --scale, --color-jitter, --aa,
    --cutout, --reprob, then --mixup or --cutmix on the batch."""

    scale: tuple[float, ...] = ()
    """Random resized crops instead of the crops of --augment: smallest and largest area of a crop as a share
    of the image, such as 0.08 1. Images in files are cropped before they are resized. Empty is off."""
    ratio: tuple[float, ...] = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio (width / height) of random resized crops."""
    color_jitter: float = 0.0
    """Multiply brightness, contrast and saturation, in random order, by random factors between 1 - this and 1
    + this; 0 is off."""
    aa: str = "none"
    """Augmentation policy: randaugment:N:M (torchvision's RandAugment, N operations per image at magnitude M,
    0 to 30), trivialaugment, autoaugment or autoaugment:cifar10|imagenet|svhn, rand-m9-mstd0.5-inc1 (timm's
    RandAugment), idbh-weak or idbh-strong."""
    cutout: int = 0
    """Side in pixels of a square, centred at a random pixel, that is set to black in every training image
    (DeVries & Taylor 2017); 0 is off."""
    reprob: float = 0.0
    """Random erasing: probability that a random rectangle of a training image is erased; 0 is off."""
    remode: Literal["pixel", "const"] = "pixel"
    """Content of erased rectangles: pixel is Gaussian noise with the data's mean and standard deviation,
    const is black."""
    mixup: float = 0.0
    """Alpha of MixUp: blend each image of a batch, and its label, with another one, with a weight drawn from
    Beta(alpha, alpha); 0 is off."""
    cutmix: float = 0.0
    """Alpha of CutMix: paste a box of another image of the batch into each image, with a share of the area
    drawn from Beta(alpha, alpha), and mix their labels in proportion; 0 is off."""
    mixup_prob: float = 1.0
    """Probability that a batch is mixed."""
    mixup_switch_prob: float = 0.5
    """Probability of CutMix instead of MixUp if both are on."""
    mixup_groups: int = 1
    """Split each batch into this many groups and mix each with its own weight and box; Wang et al. (2023) use
    four."""

    @property
    def crops(self) -> str:
        """The flag that replaces the crops of --augment, such as "aa idbh-weak"; empty if none does."""
        scale = " ".join(f"{end:g}" for end in self.scale)
        return f"scale {scale}" if scale else f"aa {self.aa}" * parse_policy(self.aa).own_crop

    @property
    def mixing(self) -> str:
        """The flag that mixes images and their labels, such as "mixup 0.8"; empty if none does."""
        on = (key for key in ("mixup", "cutmix") if getattr(self, key))
        return next((f"{key} {getattr(self, key):g}" for key in on), "")
