"""The shared part of the PGD steps of all norms: result type, checks, fake outputs, and the call itself."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdynat.ops._layout import images_together, one_order
from fastdynat.ops._select import select
from fastdynat.ops._size import Size, split_size

IMAGE_DTYPES = (torch.float32, torch.float64)
GRAD_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LOW_DTYPES = (torch.bfloat16, torch.float16)


class AttackStep(NamedTuple):
    """The outputs of one attack step.

    Attributes:
        x_adv: the new point, detached.
        low: the same in the half precision asked for, else None.
        moved: (N,) bool, False for images whose gradient was zero or NaN in every pixel: they are not
            attacked at all.
    """

    x_adv: Tensor
    low: Tensor | None
    moved: Tensor


def empty_point(x_adv: Tensor, **_: Any) -> Tensor:
    """The fake of a step that returns the new point only."""
    return torch.empty_like(x_adv)


def empty_step(x_adv: Tensor, low_dtype: torch.dtype | None, count: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Empty (x, low, moved) of a step; a tensor that is not asked for has no elements."""
    low = torch.empty_like(x_adv, dtype=low_dtype) if low_dtype is not None else x_adv.new_empty(0)
    return torch.empty_like(x_adv), low, x_adv.new_empty(x_adv.shape[0] if count else 0, dtype=torch.bool)


def step_onto_ball(
    op: str,
    implementations: Mapping[str, Callable[..., Any]],
    backend: str,
    tensors: tuple[Tensor, Tensor, Tensor],
    bounds: tuple[Size, Size, float, float],
    low_dtype: torch.dtype | None = None,
    *options: Any,
    per_image: bool = True,
) -> AttackStep:
    """Check the arguments of step `op`, which projects onto an eps-ball, and run it.

    Args:
        tensors: (x_adv, grad, x0).
        bounds: (step_size, eps, lo, hi).
        options: the operator's arguments after `low_dtype`.
        per_image: the norm, or `moved`, is taken image by image.
    """
    if per_image:
        check_batch_dimension(op, tensors[0])
    step_size, eps, lo, hi = bounds
    check_step(op, *tensors, step_size, eps, lo, hi)
    check_low(op, low_dtype)
    numbers, held = split_bounds(op, bounds, tensors[0])
    arguments = (*numbers, low_dtype, *options, *held)
    x, low, moved = run_step(op, implementations, backend, tensors, arguments, per_image=per_image)
    return AttackStep(x, low if low_dtype is not None else None, moved)


def split_bounds(
    op: str, bounds: tuple[Size, Size, float, float], x_adv: Tensor
) -> tuple[tuple[float, float, float, float], tuple[Tensor | None, Tensor | None]]:
    """The operator's arguments for (step_size, eps, lo, hi): numbers, and the tensors of the first two."""
    step_size, eps, lo, hi = bounds
    step_number, device_step_size = split_size(op, "step_size", step_size, x_adv)
    eps_number, device_eps = split_size(op, "eps", eps, x_adv)
    return (step_number, eps_number, float(lo), float(hi)), (device_step_size, device_eps)


def run_step(
    op: str,
    implementations: Mapping[str, Callable[..., Any]],
    backend: str,
    tensors: tuple[Tensor, Tensor, Tensor],
    arguments: tuple[Any, ...],
    *,
    per_image: bool = True,
) -> Any:
    """Run the selected implementation of step `op` and return its outputs.

    Args:
        tensors: (x_adv, grad, x0), of any memory layout. The implementation gets them detached and dense, in
            the memory order of x_adv; with `per_image`, each image is one block of memory.
        arguments: the operator's remaining arguments.
    """
    x_adv, grad, x0 = (t.detach() for t in tensors)
    run = select(op, implementations, backend, x_adv)
    return run(*one_order(images_together(x_adv) if per_image else x_adv, grad, x0), *arguments)


def check_step(
    op: str, x_adv: Tensor, grad: Tensor, x0: Tensor, step_size: Size, eps: Size, lo: float, hi: float
) -> None:
    """Raise ValueError, naming argument and value, for shapes, dtypes, devices or bounds that do not fit.

    What a tensor holds is not checked, as that would wait for the device.
    """
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
    if not isinstance(step_size, Tensor) and not math.isfinite(step_size):
        raise ValueError(f"{op}: step_size must be finite (in units of the pixel range), got {step_size}")
    if not isinstance(eps, Tensor) and not eps >= 0:
        raise ValueError(f"{op}: eps must be >= 0 (in units of the pixel range), got {eps}")
    if not lo <= hi:
        raise ValueError(f"{op}: lo must not exceed hi, got lo={lo} and hi={hi}")


def check_low(op: str, low_dtype: torch.dtype | None) -> None:
    """Raise ValueError unless `low_dtype` is None, bfloat16 or float16."""
    if low_dtype is not None and low_dtype not in LOW_DTYPES:
        raise ValueError(f"{op}: low_dtype must be bfloat16 or float16, got {low_dtype}")


def check_batch_dimension(op: str, x_adv: Tensor) -> None:
    """Raise ValueError for a scalar, which has no dimension of images to take norms over."""
    if x_adv.dim() == 0:
        raise ValueError(
            f"{op}: x_adv needs a first dimension of images, got a scalar; use x_adv[None] for one image"
        )
