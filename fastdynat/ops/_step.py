"""What the PGD steps of all norms share: the result, the checks, the shapes."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

IMAGE_DTYPES = (torch.float32, torch.float64)
GRAD_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LOW_DTYPES = (torch.bfloat16, torch.float16)


class AttackStep(NamedTuple):
    """One step of an attack and what its loop wants to know.

    Attributes:
        x_adv: the new point, detached.
        low: the same in the half precision asked for, else None.
        moved: (N,) bool, False for images whose gradient was zero or NaN in every pixel: they are not
            attacked at all.
    """

    x_adv: Tensor
    low: Tensor | None
    moved: Tensor


def empty_step(x_adv: Tensor, low_dtype: torch.dtype | None, count: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors like the outputs of a step: the new point, its copy in half precision, which images
    moved.
    """
    low = torch.empty_like(x_adv, dtype=low_dtype) if low_dtype is not None else x_adv.new_empty(0)
    return torch.empty_like(x_adv), low, x_adv.new_empty(x_adv.shape[0] if count else 0, dtype=torch.bool)


def check_step(
    op: str, x_adv: Tensor, grad: Tensor, x0: Tensor, step_size: float, eps: float, lo: float, hi: float
) -> None:
    """Raise ValueError, naming argument and value, where a PGD step cannot mean anything."""
    for name, tensor in (("grad", grad), ("x0", x0)):
        if tensor.shape != x_adv.shape:
            raise ValueError(
                f"{op}: {name} has shape {tuple(tensor.shape)} but x_adv has shape {tuple(x_adv.shape)}"
            )
        if tensor.device != x_adv.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} but x_adv is on {x_adv.device}")
    if x_adv.dtype not in IMAGE_DTYPES:
        raise ValueError(f"{op}: x_adv must be float32 or float64, got {x_adv.dtype}")
    if x0.dtype != x_adv.dtype:
        raise ValueError(f"{op}: x0 is {x0.dtype} but x_adv is {x_adv.dtype}")
    if grad.dtype not in GRAD_DTYPES:
        raise ValueError(f"{op}: grad must be float32, float64, bfloat16 or float16, got {grad.dtype}")
    if not math.isfinite(step_size):
        raise ValueError(f"{op}: step_size must be finite (in units of the pixel range), got {step_size}")
    if not eps >= 0:
        raise ValueError(f"{op}: eps must be >= 0 (in units of the pixel range), got {eps}")
    if not lo <= hi:
        raise ValueError(f"{op}: lo must not exceed hi, got lo={lo} and hi={hi}")


def check_low(op: str, low_dtype: torch.dtype | None) -> None:
    """Raise ValueError for another type than the half-precision ones."""
    if low_dtype is not None and low_dtype not in LOW_DTYPES:
        raise ValueError(f"{op}: low_dtype must be bfloat16 or float16, got {low_dtype}")


def check_images(op: str, x_adv: Tensor) -> None:
    """Raise ValueError where there is no dimension of images to take norms over."""
    if x_adv.dim() == 0:
        raise ValueError(
            f"{op}: x_adv needs a first dimension of images, got a scalar; use x_adv[None] for one image"
        )
