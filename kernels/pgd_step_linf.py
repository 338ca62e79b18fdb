"""The L-inf PGD step as one kernel: three reads, one write and an optional half-precision write per pixel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdynat.kernels._launch import on_device_of
from fastdynat.kernels._step import clamp_pixels, device_sizes, new_outputs, store_low

BLOCK = 1024


@triton.jit
def pgd_step_linf_kernel(
    x_adv_ptr,  # (rows, row) float32 or float64, dense
    grad_ptr,  # (rows, row) any float, in the same order
    x0_ptr,  # (rows, row) dtype of x_adv, in the same order
    out_ptr,  # (rows, row) dtype of x_adv; not aliased with the inputs
    low_ptr,  # (rows, row) float16 or bfloat16, unused unless HAS_LOW
    moved_ptr,  # (rows,) int8, zero on entry, unused unless COUNT
    row,
    step_size: tl.float64,  # an unannotated float would reach float64 images rounded to float32
    eps: tl.float64,
    lo: tl.float64,
    hi: tl.float64,
    step_size_ptr,  # float64 scalars that replace the two; unused unless READ_STEP, READ_EPS
    eps_ptr,
    HAS_LOW: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    READ_STEP: tl.constexpr,
    READ_EPS: tl.constexpr,
):
    """Write clamp(clamp(x_adv + step_size * sign(grad), x0 - eps, x0 + eps), lo, hi).

    Grid: (blocks per row, rows), flattened with the blocks of a row side by side.
    """
    blocks = (row - 1) // BLOCK + 1  # tl.cdiv adds first, which may pass int32
    image = tl.program_id(0) // blocks
    within = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = within < row
    offsets = image.to(tl.int64) * row + within
    x_adv = tl.load(x_adv_ptr + offsets, mask=mask)
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0)
    x0 = tl.load(x0_ptr + offsets, mask=mask)

    dtype = x_adv.dtype
    if READ_STEP:
        step_size = tl.load(step_size_ptr)
    if READ_EPS:
        eps = tl.load(eps_ptr)
    step_size = tl.full((1,), step_size, dtype)
    eps = tl.full((1,), eps, dtype)
    lo = tl.full((1,), lo, dtype)
    hi = tl.full((1,), hi, dtype)

    if grad.dtype.primitive_bitwidth == 16:
        grad = grad.to(tl.float32)  # exact; the interpreter of Triton 3.9 cannot compare bfloat16
    # Comparisons with NaN are false: a NaN gradient does not move the pixel. The product is exact, with FMA
    # or without.
    sign = (grad > 0).to(dtype) - (grad < 0).to(dtype)
    x = x_adv + step_size * sign
    lower = x0 - eps
    upper = x0 + eps
    x = tl.where(x < lower, lower, x)
    x = tl.where(x > upper, upper, x)
    x = clamp_pixels(x, lo, hi)
    # As torch.clamp with a NaN bound: the result is that NaN.
    x = tl.where(x0 == x0, x, x0)
    tl.store(out_ptr + offsets, x, mask=mask)
    if HAS_LOW:
        store_low(low_ptr, offsets, x, mask)
    if COUNT:
        any_moved = tl.max((sign != 0).to(tl.int32), axis=0)
        # All blocks that store write the same value, 1.
        tl.store(moved_ptr + image, any_moved.to(tl.int8), mask=any_moved > 0)


def pgd_step_linf(
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
    """Launch the kernel on the current stream; returns (x, low, moved), x and low with the layout of `x_adv`.

    All three tensors must be dense and of one memory order, with each image one block of memory if `count`.
    """
    out, low, moved = new_outputs(x_adv, low_dtype, x_adv.shape[0] if count else 0)
    if out.numel() == 0:
        return out, low, moved
    rows = x_adv.shape[0] if count else 1
    row = out.numel() // rows
    with on_device_of(x_adv):
        pgd_step_linf_kernel[(rows * triton.cdiv(row, BLOCK),)](
            x_adv,
            grad,
            x0,
            out,
            low,
            moved.view(torch.int8),
            row,
            step_size,
            eps,
            lo,
            hi,
            HAS_LOW=low_dtype is not None,
            COUNT=count,
            BLOCK=BLOCK,
            **device_sizes(x_adv, device_step_size, device_eps),
            enable_fp_fusion=False,
        )
    return out, low, moved
