"""Arrays of the user as images and labels: checked, and converted to uint8 and int64 on the CPU."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdynat.caller_warnings import warn_caller
from fastdynat.data.image_sets import CONVERT_CHUNK
from fastdynat.errors import UserError

ROUNDING = 0.02  # of 1/255: distance of float images from 8 bits that needs no message
OVERSHOOT = 0.1  # beyond [0, 1]: what resizing leaves, not another unit


def dense_tensor(value: "Tensor | np.ndarray[Any, Any]", name: str) -> Tensor:
    """`value` as a tensor, which shares its memory where it can.

    Raises:
        UserError: an array without numbers, or a tensor without data or of another layout.
    """
    if isinstance(value, np.ndarray):
        try:
            return torch.as_tensor(np.ascontiguousarray(value) if value.ndim else value)
        except TypeError:
            raise UserError(
                f"{name}: an array of {value.dtype} holds no images or labels; give numbers"
            ) from None
    if value.layout != torch.strided or value.is_meta:
        raise UserError(
            f"{name}: a {value.layout} tensor on {value.device} cannot be read; give a dense one with data"
        )
    return value


def dtype_and_shape(value: Tensor) -> str:
    """Type and shape of `value`, for messages."""
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def uint8_pixels(images: Tensor, name: str, *, numpy: bool = False) -> tuple[Tensor, float]:
    """Images (N, C, H, W), uint8 or floats in [0, 1], as uint8 on the CPU, and the largest change.

    Args:
        numpy: the user gave an array, which decides how remedies are written.

    Raises:
        UserError: another type, shape or range.
    """
    if images.ndim != 4:
        remedy = "add the channels: images[:, None]" if images.ndim == 3 else "give one image per row"
        raise UserError(f"{name}: images must be (N, C, H, W), got {dtype_and_shape(images)}; {remedy}")
    if len(images) == 0:
        raise UserError(f"{name} has no images")
    if images.shape[1] > 4 and images.shape[-1] <= 4:
        raise UserError(
            f"{name}: images are {tuple(images.shape)}, channels last; give (N, C, H, W): "
            f"images.{'transpose' if numpy else 'permute'}(0, 3, 1, 2)"
        )
    images = images.detach()
    if images.dtype == torch.uint8:
        if int(images.max()) <= 1:
            warn_caller(f"{name}: no pixel of the uint8 images is above 1 of 255; for [0, 1] give floats")
        return images.cpu().contiguous(), 0.0
    if not images.is_floating_point():
        raise UserError(
            f"{name}: images must be uint8 or floats in [0, 1], got {dtype_and_shape(images)}; use "
            + ('images.astype("uint8")' if numpy else "images.to(torch.uint8)")
        )
    return _rounded(images, name, "images.clip(0, 1)" if numpy else "images.clamp(0, 1)")


def warn_of_rounding(moved: float, name: str) -> None:
    """Warn of images whose values rounding to 8 bits has changed by up to `moved`, in [0, 1]."""
    if 255 * moved > ROUNDING:
        warn_caller(
            f"{name}: images are kept with 8 bits per channel, which moves values by up to {moved:.2g}; pass "
            "uint8 images to avoid this"
        )


def _rounded(images: Tensor, name: str, clamped: str) -> tuple[Tensor, float]:
    pixels = torch.empty(images.shape, dtype=torch.uint8)
    largest = 0.0
    for start in range(0, len(images), CONVERT_CHUNK):
        chunk = images[start : start + CONVERT_CHUNK].cpu().to(torch.float32)
        low, high = float(chunk.min()), float(chunk.max())
        if not (low >= 0 and high <= 1):  # NaN neither
            raise UserError(
                f"{name}: float images must be in [0, 1], got [{low:.8g}, {high:.8g}]; "
                f"{_remedy(low, high, clamped)}"
            )
        levels = 255 * chunk
        whole = levels.round()
        largest = max(largest, float((levels - whole).abs().max()))
        pixels[start : start + CONVERT_CHUNK] = whole.to(torch.uint8)
    return pixels, largest / 255


def _remedy(low: float, high: float, clamped: str) -> str:
    if low >= -OVERSHOOT and high <= 1 + OVERSHOOT:
        return f"use {clamped}"
    if low >= 0 and high <= 255:
        return "divide by 255"
    return "put the normalisation into the network"


def class_labels(labels: Tensor, images: int, name: str, *, numpy: bool = False) -> Tensor:
    """Labels (N,) of `images` images as int64 on the CPU.

    Args:
        numpy: see `uint8_pixels`.

    Raises:
        UserError: another type, shape or number of labels.
    """
    whole = not (labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex())
    convert = "" if whole else '.astype("int64")' if numpy else ".long()"
    problem = f"{name}: labels must be whole numbers (N,), got {dtype_and_shape(labels)}"
    if labels.ndim != 1:
        column = labels.ndim == 2 and labels.shape[1] == 1  # whose argmax is 0 everywhere
        remedy = f"use labels.squeeze(1){convert}" if column else "of one-hot rows use labels.argmax(1)"
        raise UserError(f"{problem}; {remedy}")
    if not whole:
        raise UserError(f"{problem}; use labels{convert}")
    if len(labels) != images:
        raise UserError(f"{name}: {images} images but {len(labels)} labels; give one label per image")
    return labels.detach().cpu().to(torch.int64)
