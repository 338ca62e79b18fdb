"""Random resized crops (Szegedy et al. 2015, arXiv 1409.4842, as in torchvision's RandomResizedCrop)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from fastdynat.config import AugmentationConfig
from fastdynat.data.decode import Cut
from fastdynat.data.split import seeded_generator
from fastdynat.ops.image_draws import ImageDraws

ATTEMPTS = 10  # boxes that are drawn until one is inside of the image
NUMBERS = 2 * ATTEMPTS + 2  # random numbers of an image


@dataclass(frozen=True)
class ResizedCrop:
    """A box of random area and aspect ratio at a random place, resized to the size of the images (bilinear).

    The box follows from (seed, epoch, position in the epoch) and the size of the image.

    Attributes:
        scale: the box's part of the image's area, from and to (uniform).
        ratio: its width over its height, from and to (uniform logarithm).
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    @classmethod
    def of(cls, config: AugmentationConfig) -> "ResizedCrop | None":
        """The crop that `config` turns on; None where it does not."""
        if not config.scale:
            return None
        return cls((config.scale[0], config.scale[1]), (config.ratio[0], config.ratio[1]))

    def cuts(self, positions: Tensor, *, seed: int, epoch: int) -> list[Cut]:
        """The box of the image at each of the `positions`, int64 (n,)."""
        number = seeded_generator("augmentation", "resized crop", seed, epoch).initial_seed()
        drawn = ImageDraws.of(number, positions, "cpu").uniform(NUMBERS, dtype=torch.float64)
        return [partial(self.box, u) for u in drawn.tolist()]

    def box(self, u: Sequence[float], height: int, width: int) -> tuple[int, int, int, int]:
        """(top, left, height, width) in an image (H, W), from `NUMBERS` numbers in [0, 1).

        Where none of ten boxes is inside: the largest one at the centre with an aspect ratio that is allowed.
        """
        least, most = self.ratio
        for area, aspect in zip(u[:ATTEMPTS], u[ATTEMPTS : 2 * ATTEMPTS], strict=True):
            pixels = (self.scale[0] + (self.scale[1] - self.scale[0]) * area) * (height * width)
            ratio = math.exp(math.log(least) + (math.log(most) - math.log(least)) * aspect)
            w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(u[-2] * (height - h + 1)), int(u[-1] * (width - w + 1)), h, w
        h, w = height, width
        if width / height < least:
            h = round(width / least)
        elif width / height > most:
            w = round(height * most)
        return (height - h) // 2, (width - w) // 2, h, w

    @staticmethod
    def apply(images: Tensor, cuts: Sequence[Cut]) -> Tensor:
        """uint8 images (n, C, H, W), each cut and resized to (H, W) again."""
        size = [images.shape[2], images.shape[3]]
        return torch.stack(
            [
                F.resized_crop(
                    image, *cut(*size), size=size, interpolation=InterpolationMode.BILINEAR, antialias=True
                )
                for image, cut in zip(images, cuts, strict=True)
            ]
        )
