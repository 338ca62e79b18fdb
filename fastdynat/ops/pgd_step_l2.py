"""The L2 PGD step: ascend along the normalised gradient, project onto the ball, clip to the pixel range."""

from typing import Any

import torch
from torch import Tensor

from fastdynat.ops._register import register_operator
from fastdynat.ops._size import Size, size_in
from fastdynat.ops._step import AttackStep, empty_step, step_onto_ball

OP = "pgd_step_l2"
# Squares of gradient entries in this range neither overflow nor vanish in float64; every float32 is in it.
SMALLEST, LARGEST = 1e-150, 1e150


def _per_image(t: Tensor, like: Tensor) -> Tensor:
    """View `t` (N,) so that it broadcasts over the images of `like`."""
    return t.reshape(-1, *[1] * (like.dim() - 1))


def finite_gradient(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `grad` in the dtype of the images, with NaN as 0 and infinity as the largest finite value."""
    grad = torch.nan_to_num(grad.to(dtype), nan=0.0)
    if dtype == torch.float64:
        grad = torch.where(grad.abs() < SMALLEST, 0.0, grad.clamp(-LARGEST, LARGEST))
    return grad


def _eager(
    x_adv: Tensor,
    grad: Tensor,
    x0: Tensor,
    step_size: float,
    eps: float,
    lo: float,
    hi: float,
    low_dtype: torch.dtype | None = None,
    device_step_size: Tensor | None = None,
    device_eps: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The reference. It takes the norm of the moved delta directly; kernels compute it from three sums."""
    step, radius = size_in(x_adv.dtype, step_size, device_step_size), size_in(x_adv.dtype, eps, device_eps)
    g = finite_gradient(grad, x_adv.dtype)
    pixels = (x_adv.shape[0], x_adv[:1].numel())
    # Dividing by the largest entry keeps squares in the range of float32; it is 0 only if all entries are.
    largest = torch.cat([g.reshape(pixels).abs(), g.new_zeros(pixels[0], 1)], 1).amax(1)
    g = g / _per_image(torch.where(largest > 0, largest, 1.0), g)
    length = torch.linalg.vector_norm(g.reshape(pixels), dim=1).clamp_min(1.0)
    delta = x_adv - x0 + step * (g / _per_image(length, g))
    norm = torch.linalg.vector_norm(delta.reshape(pixels), dim=1)
    # A NaN norm makes the whole image NaN. torch divides a number by a tensor as the product here.
    delta = delta * _per_image(torch.where(norm <= radius, 1.0, norm.reciprocal() * radius), delta)
    x = (x0 + delta).clamp(lo, hi)
    return x, x.to(low_dtype) if low_dtype is not None else x.new_empty(0), largest > 0


def _fake(x_adv: Tensor, low_dtype: torch.dtype | None, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_step(x_adv, low_dtype, True)


IMPLEMENTATIONS = register_operator(OP, eager=_eager, fake=_fake)


def pgd_step_l2(
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
    """Return clamp(x0 + P(x_adv + step_size * grad / ||grad||_2 - x0), lo, hi) per image, as a new tensor.

    P scales a vector longer than `eps` to that length. Kernels sum in float64 and round once, so that they
    differ from each other by an ulp at most; "eager" computes in the dtype of `x_adv` (float32: within 1e-6
    for pixels in [0, 1]). The result can leave the ball only by the rounding of its pixels to that dtype.
    Source: Madry et al. 2018 (arXiv 1706.06083), section 2.1, with the steepest ascent of the L2 norm. The
    result is detached.

    Gradient entries that are NaN count as 0, infinite ones as the largest finite value of x_adv's dtype; for
    float64 images entries below 1e-150 count as 0 and those above 1e150 as 1e150. Where all are 0 the image
    makes no step, but is projected and clipped. A NaN in `x_adv` or `x0` makes its whole image NaN. A
    negative `step_size` descends.

    Args:
        x_adv: the current points, (N, ...), float32 or float64, usually (N, C, H, W) in [lo, hi]. Its memory
            layout is the result's where each image is one block of memory (contiguous, channels-last), else
            the result is contiguous; grad and x0 are copied only where they are laid out differently.
        grad: gradient at `x_adv`, same shape, float32, float64, bfloat16 or float16.
        x0: the clean images, shape and dtype of `x_adv`.
        step_size: length of the move, in units of the pixel range; a number or a scalar
            tensor, as in `pgd_step_linf`.
        eps: L2 radius around `x0`, >= 0, in the same unit; a number or a scalar tensor.
        lo, hi: the pixel range, lo <= hi.
        backend: "auto" or one of `fastdynat.ops.BACKENDS`.

    Raises:
        ValueError: shapes, dtypes, devices or bounds do not fit; UserError for an unknown backend.
        RuntimeError: the backend asked for cannot run here.
    """
    bounds = (step_size, eps, lo, hi)
    return step_onto_ball(OP, IMPLEMENTATIONS, backend, (x_adv, grad, x0), bounds).x_adv


def attack_step_l2(
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
    """`pgd_step_l2` with a half-precision copy and the mask of moved images from the same pass.

    Args:
        x_adv, grad, x0, step_size, eps, lo, hi, backend: as in `pgd_step_l2`.
        low_dtype: also return the new point in bfloat16 or float16, for a network in that dtype.

    Raises: as `pgd_step_l2`.
    """
    bounds = (step_size, eps, lo, hi)
    return step_onto_ball(OP, IMPLEMENTATIONS, backend, (x_adv, grad, x0), bounds, low_dtype)
