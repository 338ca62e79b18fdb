"""Shared parts of the PGD step kernels: output tensors, gradient loads, clipping, half-precision copies."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def new_outputs(x_adv: Tensor, low_dtype: torch.dtype | None, images: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x, low, moved) for a kernel to fill: `low` is empty without a dtype, `moved` is False per image."""
    low = torch.empty_like(x_adv, dtype=low_dtype) if low_dtype is not None else x_adv.new_empty(0)
    return torch.empty_like(x_adv), low, x_adv.new_zeros(images, dtype=torch.bool)


def device_sizes(x_adv: Tensor, step_size: Tensor | None, eps: Tensor | None) -> dict[str, Any]:
    """The kernels' arguments for sizes on the device; a pointer without a size is not read."""
    return {
        "step_size_ptr": x_adv if step_size is None else step_size,
        "eps_ptr": x_adv if eps is None else eps,
        "READ_STEP": step_size is not None,
        "READ_EPS": eps is not None,
    }


@triton.jit
def load_gradient(grad_ptr, offsets, mask, dtype: tl.constexpr):
    """Load the gradient for images of `dtype`: NaN is 0, infinity the largest finite value.

    As `finite_gradient` in fastdynat.ops.
    """
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0)
    if grad.dtype.primitive_bitwidth == 16:
        grad = grad.to(tl.float32)  # exact; there is no direct conversion from bfloat16 to float64
    grad = tl.where(grad == grad, grad, 0.0)
    if dtype == tl.float64:
        magnitude = tl.abs(grad.to(tl.float64))
        magnitude = tl.where(magnitude > 1e150, 1e150, magnitude)
        magnitude = tl.where(magnitude < 1e-150, 0.0, magnitude)
        grad = tl.where(grad < 0, -magnitude, magnitude)
    else:
        largest = 3.4028234663852886e38  # before the conversion, which may be from float64
        grad = tl.where(grad > largest, largest, tl.where(grad < -largest, -largest, grad)).to(tl.float32)
    return grad


@triton.jit
def clamp_pixels(x, lo, hi):
    """Clamp x to [lo, hi]; a NaN stays."""
    x = tl.where(x < lo, lo, x)
    return tl.where(x > hi, hi, x)


@triton.jit
def store_low(low_ptr, offsets, x, mask):
    """Store a half-precision copy of x."""
    tl.store(low_ptr + offsets, x.to(tl.float32).to(low_ptr.dtype.element_ty), mask=mask)
