"""Augmentation policies: which operations an image gets, drawn for its position."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fastdynat.data.augmentation.autoaugment_tables import AUTOAUGMENT_TABLES
from fastdynat.data.augmentation.image_operations import (
    UNCHANGED,
    Choice,
    Resampling,
    apply_choices,
)
from fastdynat.data.augmentation.magnitudes import (
    OF_AUTOAUGMENT,
    OF_RANDAUGMENT,
    OF_TRIVIALAUGMENT,
    RANDAUGMENT,
    TIMM,
    timm_magnitude,
)
from fastdynat.ops.image_draws import ImageDraws

Size = tuple[int, int]  # height, width
ThingT = TypeVar("ThingT")
# Of IDBH: the least and the largest magnitude.
IDBH_RANGES = {
    "color": (0.1, 1.9),
    "brightness": (0.5, 1.9),
    "contrast": (0.5, 1.9),
    "sharpness": (0.1, 1.9),
    "lean": (0.05, 0.15),
    "rotate": (1, 11),
}


class Policy(ABC):
    """A stage that changes each image by a sequence of operations of its own.

    Attributes:
        numbers: random numbers of an image.
        how: resampling of the operations.
    """

    kind = "policy"
    numbers: int
    how = Resampling()

    def apply(self, images: Tensor, draws: ImageDraws) -> Tensor:
        for choices in self.choices(draws, (images.shape[2], images.shape[3])):
            images = apply_choices(images, choices, self.how)
        return images

    def choices(self, draws: ImageDraws, size: Size) -> list[list[Choice]]:
        """The first operation of every image, the second of every image, and so on."""
        drawn = draws.uniform(self.numbers, dtype=torch.float64).tolist()
        by_image = [self.choose(numbers, size) for numbers in drawn]
        return [list(turn) for turn in zip(*by_image, strict=True)]

    @abstractmethod
    def choose(self, u: Sequence[float], size: Size) -> list[Choice]:
        """The operations of one image (H, W), equally many for all; u: `numbers` numbers in [0, 1)."""


@dataclass(frozen=True)
class RandAugment(Policy):
    """torchvision's RandAugment: `operations` of 14, all at the `magnitude` from 0 to 30."""

    operations: int = 2
    magnitude: int = 9

    @property
    def numbers(self) -> int:  # type: ignore[override]
        return 2 * self.operations

    def choose(self, u: Sequence[float], size: Size) -> list[Choice]:
        return [
            (name, OF_RANDAUGMENT.magnitude(name, self.magnitude, u[at + 1] < 0.5, size))
            for at in range(0, self.numbers, 2)
            for name in [_one_of(RANDAUGMENT, u[at])]
        ]


@dataclass(frozen=True)
class TrivialAugment(Policy):
    """torchvision's TrivialAugmentWide: one of 14 operations, at one of 31 magnitudes."""

    numbers = 3

    def choose(self, u: Sequence[float], size: Size) -> list[Choice]:
        name = _one_of(RANDAUGMENT, u[0])
        index = int(u[1] * OF_TRIVIALAUGMENT.bins)
        return [(name, OF_TRIVIALAUGMENT.magnitude(name, index, u[2] < 0.5, size))]


@dataclass(frozen=True)
class AutoAugment(Policy):
    """torchvision's AutoAugment: one of the 25 sub-policies of `table`."""

    table: str
    numbers = 5

    def choose(self, u: Sequence[float], size: Size) -> list[Choice]:
        found = []
        steps = _one_of(AUTOAUGMENT_TABLES[self.table], u[0])
        for (name, prob, index), drawn, sign in zip(steps, u[1::2], u[2::2], strict=True):
            magnitude = OF_AUTOAUGMENT.magnitude(name, index, sign < 0.5, size)
            found.append((name, magnitude) if drawn < prob else UNCHANGED)
        return found


@dataclass(frozen=True)
class TimmRandAugment(Policy):
    """timm's RandAugment: `operations` of 15, each with probability `prob`, of a normal or uniform strength.

    The resampling is bilinear. timm's is the `interpolation` that it is asked for: bicubic in the ImageNet
    releases, which torchvision lacks for tensors; with "random", it draws between both.

    Attributes:
        strength, spread, most: mean, standard deviation and largest value of the strength out of 10; with a
            spread above 100 the strength is uniform from 0 to `strength`.
        increasing: as of `timm_magnitude`.
        fill: the values, in 0..255, of what comes from outside of the image.
    """

    operations: int
    strength: float
    spread: float
    most: float
    increasing: bool
    prob: float
    fill: tuple[float, ...]

    @property
    def numbers(self) -> int:  # type: ignore[override]
        return 5 * self.operations

    @property
    def how(self) -> Resampling:  # type: ignore[override]
        return Resampling(bilinear=True, fill=self.fill)

    def choose(self, u: Sequence[float], size: Size) -> list[Choice]:
        found = []
        for at in range(0, self.numbers, 5):
            name, chance, sign = _one_of(TIMM, u[at]), u[at + 1], u[at + 2]
            strength = self._strength(u[at + 3], u[at + 4])
            magnitude = timm_magnitude(name, strength, sign < 0.5, size, increasing=self.increasing)
            found.append((name, magnitude) if chance < self.prob else UNCHANGED)
        return found

    def _strength(self, first: float, second: float) -> float:
        if self.spread > 100:
            strength = first * self.strength
        else:
            # Box and Muller: two uniform numbers make a normal one.
            normal = math.sqrt(-2 * math.log(1 - first)) * math.cos(2 * math.pi * second)
            strength = self.strength + self.spread * normal
        return min(max(strength, 0.0), self.most)


@dataclass(frozen=True)
class IdbhColorShape(Policy):
    """The layer of colour and shape of IDBH (Li and Spratling 2023, arXiv 2301.09879): one of eight."""

    numbers = 4

    def choose(self, u: Sequence[float], size: Size) -> list[Choice]:
        name = _one_of((*IDBH_RANGES, "autocontrast", "equalize"), u[0])
        if name not in IDBH_RANGES:
            return [(name, 0.0)]
        least, most = IDBH_RANGES[name]
        magnitude = least + (most - least) * u[1]
        if name == "rotate":
            magnitude = float(int(magnitude))  # whole degrees below the largest
        sign = -1 if u[2] < 0.5 else 1
        if name == "lean":
            return [("lean_x" if u[3] < 0.5 else "lean_y", sign * magnitude)]
        return [(name, sign * magnitude if name == "rotate" else magnitude)]


@dataclass(frozen=True)
class ColorJitter(Policy):
    """torchvision's ColorJitter of brightness, contrast and saturation, in random order.

    Each factor is uniform from max(0, 1 - strength) to 1 + strength.
    """

    strength: float
    kind = "color jitter"
    numbers = 6

    def choose(self, u: Sequence[float], size: Size) -> list[Choice]:
        least = max(0.0, 1 - self.strength)
        factors = [least + (1 + self.strength - least) * number for number in u[:3]]
        named = list(zip(("brightness", "contrast", "color"), factors, strict=True))
        return [choice for _, choice in sorted(zip(u[3:], named, strict=True))]


def _one_of(things: Sequence[ThingT], u: float) -> ThingT:
    """One of `things`, uniformly for `u` uniform in [0, 1)."""
    return things[int(u * len(things))]
