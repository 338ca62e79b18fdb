"""The operations of augmentation policies on uint8 batches, by torchvision.transforms.v2.

Each is called once for all images of a batch that share it and its magnitude. Its result for an image does
not depend on which other images these are.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

Choice = tuple[str, float]  # a key of `OPERATIONS` and its magnitude
UNCHANGED: Choice = ("identity", 0.0)
HALF = 128  # solarize_add changes values below


@dataclass(frozen=True)
class Resampling:
    """The interpolation of operations that move pixels, and the filling of what comes from outside.

    fill: of each channel, in 0..255; None is black.
    """

    bilinear: bool = False
    fill: tuple[float, ...] | None = None

    @property
    def mode(self) -> InterpolationMode:
        return InterpolationMode.BILINEAR if self.bilinear else InterpolationMode.NEAREST


def _sheared(x: float, y: float, centre: list[float] | None, images: Tensor, how: Resampling) -> Tensor:
    return F.affine(
        images,
        angle=0.0,
        translate=[0.0, 0.0],
        scale=1.0,
        shear=[math.degrees(x), math.degrees(y)],
        interpolation=how.mode,
        fill=_fill(how),
        center=centre,
    )


def _moved(x: float, y: float, images: Tensor, how: Resampling) -> Tensor:
    return F.affine(
        images,
        angle=0.0,
        translate=[x, y],
        scale=1.0,
        shear=[0.0, 0.0],
        interpolation=how.mode,
        fill=_fill(how),
    )


def _rotated(degrees: float, images: Tensor, how: Resampling) -> Tensor:
    return F.rotate(images, degrees, interpolation=how.mode, fill=_fill(how))


def _fill(how: Resampling) -> list[float] | None:
    return None if how.fill is None else list(how.fill)


def _solarized(threshold: float, images: Tensor) -> Tensor:
    return images if threshold > 255 else F.solarize(images, threshold)


def _solarized_add(add: int, images: Tensor) -> Tensor:
    return torch.where(images < HALF, (images.int() + add).clamp(max=255).to(torch.uint8), images)


CORNER = [0.0, 0.0]
# By name: images (n, C, H, W), magnitude and resampling -> changed images.
OPERATIONS: dict[str, Callable[[Tensor, float, Resampling], Tensor]] = {
    "identity": lambda images, m, how: images,
    # The tangent of the angle, around the top left corner.
    "shear_x": lambda images, m, how: _sheared(math.atan(m), 0.0, CORNER, images, how),
    "shear_y": lambda images, m, how: _sheared(0.0, math.atan(m), CORNER, images, how),
    # The angle in radians, around the centre.
    "lean_x": lambda images, m, how: _sheared(m, 0.0, None, images, how),
    "lean_y": lambda images, m, how: _sheared(0.0, m, None, images, how),
    # Pixels.
    "translate_x": lambda images, m, how: _moved(m, 0.0, images, how),
    "translate_y": lambda images, m, how: _moved(0.0, m, images, how),
    # Degrees.
    "rotate": lambda images, m, how: _rotated(m, images, how),
    # Factors; 1 leaves the image alone.
    "brightness": lambda images, m, how: F.adjust_brightness(images, m),
    "color": lambda images, m, how: F.adjust_saturation(images, m),
    "contrast": lambda images, m, how: F.adjust_contrast(images, m),
    "sharpness": lambda images, m, how: F.adjust_sharpness(images, m),
    # Bits that are kept.
    "posterize": lambda images, m, how: F.posterize(images, int(m)),
    # The least of 0..255 that is inverted; above 255 none is.
    "solarize": lambda images, m, how: _solarized(m, images),
    # What is added to values below 128.
    "solarize_add": lambda images, m, how: _solarized_add(int(m), images),
    "autocontrast": lambda images, m, how: F.autocontrast(images),
    "equalize": lambda images, m, how: F.equalize(images),
    "invert": lambda images, m, how: F.invert(images),
}


def apply_choices(images: Tensor, choices: Sequence[Choice], how: Resampling) -> Tensor:
    """uint8 images (n, C, H, W), each changed by its own operation; `images` stays as it is."""
    rows: dict[Choice, list[int]] = defaultdict(list)
    for row, choice in enumerate(choices):
        rows[choice].append(row)
    rows.pop(UNCHANGED, None)
    if not rows:
        return images
    found = images.clone()
    for (name, magnitude), chosen in rows.items():
        where = torch.tensor(chosen, device=images.device)
        found[where] = OPERATIONS[name](images[where], magnitude, how)
    return found
