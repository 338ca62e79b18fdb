"""The L-inf PGD step: ascend along the gradient's sign, project onto the ball, clip to the pixel range."""

from typing import Any

import torch
from torch import Tensor

from fastdynat.ops._register import register_operator
from fastdynat.ops._size import Size, size_in
from fastdynat.ops._step import AttackStep, check_batch_dimension, empty_step, step_onto_ball

OP = "pgd_step_linf"


def _eager(
    x_adv: Tensor,
    grad: Tensor,
    x0: Tensor,
    step_size: float,
    eps: float,
    lo: float,
    hi: float,
    low_dtype: torch.dtype | None = None,
    count: bool = False,
    device_step_size: Tensor | None = None,
    device_eps: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The reference, which every other implementation equals bit for bit."""
    # Comparisons with NaN are false: such a pixel does not move. torch.sign promises nothing for NaN.
    up, down = grad > 0, grad < 0
    step, radius = size_in(x_adv.dtype, step_size, device_step_size), size_in(x_adv.dtype, eps, device_eps)
    x = x_adv + step * (up.to(x_adv.dtype) - down.to(x_adv.dtype))
    x = torch.clamp(x, x0 - radius, x0 + radius)
    x = torch.clamp(x, lo, hi)
    low = x.to(low_dtype) if low_dtype is not None else x.new_empty(0)
    if not count:
        return x, low, x.new_empty(0, dtype=torch.bool)
    moved = (up | down).reshape(grad.shape[0], grad[:1].numel())
    return x, low, moved.any(1)


def _fake(
    x_adv: Tensor, low_dtype: torch.dtype | None, count: bool, **_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_step(x_adv, low_dtype, count)


IMPLEMENTATIONS = register_operator(OP, eager=_eager, fake=_fake)


def pgd_step_linf(
    x_adv: Tensor,
    grad: Tensor,
    x0: Tensor,
    *,
    step_size: Size,
    eps: Size,
    lo: float = 0.0,
    hi: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Return clamp(clamp(x_adv + step_size * sign(grad), x0 - eps, x0 + eps), lo, hi), as a new tensor.

    Bitwise the same in every backend. sign(0) = 0; where `grad` is NaN the pixel does not move. NaN in
    `x_adv` or `x0` gives NaN. A negative `step_size` descends. The result is detached. Source: Madry et al.
    2018 (arXiv 1706.06083), section 2.1.

    Args:
        x_adv: the current point, any shape, float32 or float64, usually (N, C, H, W) in [lo, hi]. Its memory
            layout is the result's; grad and x0 are copied only where they are laid out differently.
        grad: gradient at `x_adv`, same shape, float32, float64, bfloat16 or float16.
        x0: the clean images, shape and dtype of `x_adv`.
        step_size: move per pixel, in units of the pixel range: a number, or a float32 or float64 scalar
            tensor on the device of `x_adv`. The kernel reads the tensor when it runs, so that a captured
            graph reads it at each replay; its value is not checked. Equal sizes give equal bits.
        eps: L-inf radius around `x0`, >= 0, in the same unit; a number or a scalar tensor.
        lo, hi: the pixel range, lo <= hi.
        backend: "auto" or one of `fastdynat.ops.BACKENDS`.

    Raises:
        ValueError: shapes, dtypes, devices or bounds do not fit; UserError for an unknown backend.
        RuntimeError: the backend asked for cannot run here.
    """
    bounds = (step_size, eps, lo, hi)
    tensors = (x_adv, grad, x0)
    return step_onto_ball(OP, IMPLEMENTATIONS, backend, tensors, bounds, None, False, per_image=False).x_adv


def attack_step_linf(
    x_adv: Tensor,
    grad: Tensor,
    x0: Tensor,
    *,
    step_size: Size,
    eps: Size,
    lo: float = 0.0,
    hi: float = 1.0,
    low_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> AttackStep:
    """`pgd_step_linf` with a half-precision copy and the mask of moved images from the same pass.

    Args:
        x_adv, grad, x0, step_size, eps, lo, hi, backend: as in `pgd_step_linf`; the first dimension is the
            image.
        low_dtype: also return the new point in bfloat16 or float16, for a network in that dtype.

    Raises: as `pgd_step_linf`.
    """
    check_batch_dimension("attack_step_linf", x_adv)
    bounds = (step_size, eps, lo, hi)
    return step_onto_ball(OP, IMPLEMENTATIONS, backend, (x_adv, grad, x0), bounds, low_dtype, True)
