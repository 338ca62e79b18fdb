"""Magnitudes of the operations of a policy, by index (torchvision's tables) and by strength (timm's).

torchvision: RandAugment (Cubuk et al. 2020, arXiv 1909.13719), TrivialAugment Wide (Mueller and Hutter
2021, 2103.10158) and AutoAugment (Cubuk et al. 2019, 1805.09501) have one table each, of float32 numbers.
timm's RandAugment is that of TensorFlow's EfficientNet.
"""

from dataclasses import dataclass
from functools import cache

import torch

ENHANCED = ("brightness", "color", "contrast", "sharpness")
PLAIN = ("identity", "autocontrast", "equalize", "invert")
RANDAUGMENT = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", *ENHANCED),
    *("posterize", "solarize", "autocontrast", "equalize"),
)
TIMM = (
    *("autocontrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add"),
    *("color", "contrast", "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y"),
)
TIMM_STRENGTH = 10.0  # the strength at which an operation is at the end of its range
TIMM_TRANSLATION = 0.45  # of the image's side, there


@dataclass(frozen=True)
class Ranges:
    """The largest magnitudes of a policy's operations, in `bins` steps from the identity.

    Attributes:
        shear: tangent of the angle.
        rotate: degrees.
        enhance: distance of a factor from 1.
        posterize: bits that are lost.
        translate: pixels; None is 150/331 of the image's side.
    """

    bins: int
    shear: float
    rotate: float
    enhance: float
    posterize: float
    translate: float | None

    def magnitude(self, operation: str, index: int, negative: bool, size: tuple[int, int]) -> float:
        """The magnitude at `index` in [0, bins), for images of `size` (H, W)."""
        if operation in PLAIN:
            return 0.0
        if operation == "posterize":
            return float(round(8 - index * self.posterize / (self.bins - 1)))
        if operation == "solarize":
            return 255.0 * _steps(1.0, 0.0, self.bins)[index]
        largest = {"shear_x": self.shear, "shear_y": self.shear, "rotate": self.rotate}
        largest |= dict.fromkeys(ENHANCED, self.enhance)
        for axis, side in (("y", size[0]), ("x", size[1])):
            largest[f"translate_{axis}"] = 150.0 / 331.0 * side if self.translate is None else self.translate
        value = _steps(0.0, largest[operation], self.bins)[index] * (-1 if negative else 1)
        if operation.startswith("translate"):
            return float(int(value))
        return 1.0 + value if operation in ENHANCED else value


@cache
def _steps(first: float, last: float, bins: int) -> tuple[float, ...]:
    return tuple(torch.linspace(first, last, bins).tolist())


OF_RANDAUGMENT = Ranges(31, shear=0.3, rotate=30.0, enhance=0.9, posterize=4, translate=None)
OF_TRIVIALAUGMENT = Ranges(31, shear=0.99, rotate=135.0, enhance=0.99, posterize=6, translate=32.0)
OF_AUTOAUGMENT = Ranges(10, shear=0.3, rotate=30.0, enhance=0.9, posterize=4, translate=None)


def timm_magnitude(
    operation: str, strength: float, negative: bool, size: tuple[int, int], *, increasing: bool
) -> float:
    """The magnitude of one of `TIMM` at a `strength` out of 10, for images of `size` (H, W).

    increasing: every operation grows with the strength. Else posterize and solarize fade with it, and the
        factors of brightness, color, contrast and sharpness go from 0.1 to 1.9.
    """
    level, sign = strength / TIMM_STRENGTH, -1 if negative else 1
    if operation in PLAIN:
        return 0.0
    if operation == "rotate":
        return sign * level * 30.0
    if operation in ("shear_x", "shear_y"):
        return sign * level * 0.3
    if operation in ("translate_x", "translate_y"):
        return sign * level * TIMM_TRANSLATION * size[operation == "translate_x"]
    if operation == "posterize":
        return float(4 - int(level * 4) if increasing else int(level * 4))
    if operation == "solarize":
        threshold = min(256, int(level * 256))
        return float(256 - threshold if increasing else threshold)
    if operation == "solarize_add":
        return float(min(128, int(level * 110)))
    return max(0.1, 1.0 + sign * level * 0.9) if increasing else level * 1.8 + 0.1
