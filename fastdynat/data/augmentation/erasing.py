"""Cutout (DeVries and Taylor 2017, arXiv 1708.04552) and random erasing (Zhong et al. 2017, 1708.04896)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdynat.ops.image_draws import ImageDraws

ATTEMPTS = 10  # rectangles that are drawn until one fits; torchvision and timm give up after as many


@dataclass(frozen=True)
class Cutout:
    """A black square of `size` pixels per side, centred at a uniformly random pixel and cut at the border."""

    size: int
    kind: str = "cutout"

    def apply(self, images: Tensor, draws: ImageDraws) -> Tensor:
        sides = torch.tensor(images.shape[2:])
        corners = (draws.uniform(2, dtype=torch.float64) * sides).long() - self.size // 2
        return images.masked_fill(box_mask(images, corners, torch.tensor(self.size).expand(2)), 0)


@dataclass(frozen=True)
class Erasing:
    """A rectangle of random area and aspect ratio, at a random place, in a share of the images.

    Attributes:
        prob: the share.
        area: the rectangle's part of the image, from and to (uniform). The default is timm's.
        aspect: height over width, from and to (uniform logarithm).
        noise: mean and standard deviation of each channel, in [0, 1] units, of the normal noise that fills
            the rectangle, clamped to [0, 1]; None fills it with black.
    """

    prob: float
    area: tuple[float, float] = (0.02, 1 / 3)
    aspect: tuple[float, float] = (0.3, 1 / 0.3)
    noise: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    kind: str = "erasing"

    def apply(self, images: Tensor, draws: ImageDraws) -> Tensor:
        corners, sides = self.boxes(draws, images.shape[2], images.shape[3])
        if self.noise is None:
            return images.masked_fill(box_mask(images, corners, sides), 0)
        rows = (sides[:, 0] > 0).nonzero().flatten()
        found = images.clone()
        some = images[rows.to(images.device)]
        mask = box_mask(some, corners[rows], sides[rows])
        found[rows.to(images.device)] = torch.where(mask, self._noise(some, draws.take(rows)), some)
        return found

    def boxes(self, draws: ImageDraws, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Top left corners and (height, width) of the rectangles, int64 (n, 2); sides of 0 where none is.

        Each attempt draws area and aspect; a rectangle that reaches from border to border is another attempt,
        and there is none after the last.
        """
        u = draws.uniform(2 * ATTEMPTS + 3, dtype=torch.float64)
        least, most = self.area
        area = (least + (most - least) * u[:, :ATTEMPTS]) * (height * width)
        low, high = math.log(self.aspect[0]), math.log(self.aspect[1])
        aspect = torch.exp(low + (high - low) * u[:, ATTEMPTS : 2 * ATTEMPTS])
        # Rounded half to even, as Python does.
        sides = torch.stack([(area * aspect).sqrt().round(), (area / aspect).sqrt().round()], dim=2).long()
        whole = torch.tensor([height, width])
        fits = (sides < whole).all(2)
        rows = torch.arange(len(u))
        sides = sides[rows, fits.int().argmax(1)] * (fits.any(1) & (u[:, -3] < self.prob))[:, None]
        return (u[:, -2:] * (whole - sides + 1)).long(), sides

    def _noise(self, images: Tensor, draws: ImageDraws) -> Tensor:
        """Noise in place of uint8 images (n, C, H, W), drawn on their device."""
        assert self.noise is not None
        device = images.device
        own = ImageDraws(draws.state.to(device), draws.images.to(device), draws.stride, draws.numbers)
        mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) * 255 for values in self.noise)
        return (own.normal(*images.shape[1:]) * std + mean).round_().clamp_(0, 255).to(torch.uint8)


def box_mask(images: Tensor, corners: Tensor, sides: Tensor) -> Tensor:
    """bool (n, 1, H, W) on the device of `images` (n, C, H, W): the pixels of each box.

    corners: int64 (n, 2), top and left, which may be outside. sides: int64 (n, 2) or (2,), height and width.
    """
    inside = []
    for axis, length in enumerate(images.shape[2:]):
        at = torch.arange(length)
        begin = corners[:, axis : axis + 1]
        inside.append((at >= begin) & (at < begin + sides[..., axis : axis + 1]))
    rows, columns = (mask.to(images.device) for mask in inside)
    return (rows[:, :, None] & columns[:, None, :])[:, None]
