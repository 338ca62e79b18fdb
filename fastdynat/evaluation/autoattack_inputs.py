"""Checks of the images, labels and device that AutoAttack is given."""

import torch
from torch import Tensor, nn

from fastdynat.attack_engine.input_checks import as_labels, check_range
from fastdynat.errors import UserError


def check_place(model: object, device: torch.device) -> None:
    """Raise UserError if the weights of `model` are not on `device`."""
    weight = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if weight is None:
        return
    other = device.index is not None and weight.device.index != device.index
    if weight.device.type != device.type or other:
        raise UserError(
            f"the model is on {weight.device}, images are attacked on {device}; "
            f"use device={str(weight.device)!r}"
        )


def check_labels(y: Tensor, classes: int) -> None:
    """Raise UserError unless every label is a class of the network."""
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= classes:
        raise UserError(f"y must be in 0 .. {classes - 1}, the network's classes; it is in {low} .. {high}")


def check_and_clamp(x: Tensor, y: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """The images, detached and clamped, and their labels as int64 on the same device.

    Raises:
        UserError: `x` is not a batch of images in [0, 1], or `y` not one class for each.
    """
    if (
        not isinstance(x, Tensor)
        or x.dtype not in (torch.float32, torch.float64)
        or x.dim() != 4
        or len(x) == 0
    ):
        given = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise UserError(
            f"x must be float32 or float64 images (N, C, H, W) in [0, 1], got {given}; use x.float()"
        )
    x = x.detach()
    check_range(float(x.min()), float(x.max()))
    labels = as_labels(y, x)
    if labels.dim() != 1:
        raise UserError(
            f"y must be {len(x)} integer classes, got shape {tuple(labels.shape)}; use y.argmax(1)"
        )
    if batch_size < 1:
        raise UserError(f"bs must be >= 1, got {batch_size}")
    return x.clamp(0, 1), labels
