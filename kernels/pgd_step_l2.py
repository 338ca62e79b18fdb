"""The L2 PGD step: one kernel that reads each image once, or two for images too large for one program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdynat.kernels._launch import on_device_of
from fastdynat.kernels._step import (
    clamp_pixels,
    device_sizes,
    load_gradient,
    new_outputs,
    store_low,
)

LARGEST_IN_REGISTERS = 8192  # elements of an image
SPLIT_BLOCK = 4096  # elements per program of a larger one


@triton.jit
def load_pixels(x_adv_ptr, grad_ptr, x0_ptr, offsets, mask):
    """(delta float64, gradient float64, x0 in its own dtype)."""
    x_adv = tl.load(x_adv_ptr + offsets, mask=mask, other=0.0)
    grad = load_gradient(grad_ptr, offsets, mask, x_adv.dtype)
    x0 = tl.load(x0_ptr + offsets, mask=mask, other=0.0)
    return x_adv.to(tl.float64) - x0.to(tl.float64), grad.to(tl.float64), x0


@triton.jit
def store_step(
    delta,
    grad,
    x0,
    gg,
    dg,
    dd,
    out_ptr,
    low_ptr,
    offsets,
    mask,
    step_size,
    eps,
    lo,
    hi,
    HAS_LOW: tl.constexpr,
):
    """Finish the step from the sums over the image, as L2Step in csrc/."""
    a = tl.where(gg > 0, step_size / tl.sqrt(tl.where(gg > 0, gg, 1.0)), 0.0)
    squared = dd + a * (2 * dg + a * gg)
    norm = tl.sqrt(tl.where(squared < 0, 0.0, squared))  # rounding may leave less than 0; a NaN stays
    inside = norm <= eps
    scale = tl.where(inside, 1.0, eps / tl.where(inside, 1.0, norm))
    x = (x0.to(tl.float64) + scale * (delta + a * grad)).to(x0.dtype)
    lo = tl.full((1,), lo, x0.dtype)
    hi = tl.full((1,), hi, x0.dtype)
    x = clamp_pixels(x, lo, hi)
    tl.store(out_ptr + offsets, x, mask=mask)
    if HAS_LOW:
        store_low(low_ptr, offsets, x, mask)


@triton.jit
def pgd_step_l2_kernel(
    x_adv_ptr,  # (rows, row) float32 or float64, dense
    grad_ptr,  # (rows, row) any float, in the same order
    x0_ptr,  # (rows, row) dtype of x_adv, in the same order
    out_ptr,  # (rows, row) dtype of x_adv; not aliased with the inputs
    low_ptr,  # (rows, row) float16 or bfloat16, unused unless HAS_LOW
    moved_ptr,  # (rows,) int8
    row,
    step_size: tl.float64,  # an unannotated float would arrive rounded to float32
    eps: tl.float64,
    lo: tl.float64,
    hi: tl.float64,
    step_size_ptr,  # float64 scalars that replace the two; unused unless READ_STEP, READ_EPS
    eps_ptr,
    HAS_LOW: tl.constexpr,
    BLOCK: tl.constexpr,
    READ_STEP: tl.constexpr,
    READ_EPS: tl.constexpr,
):
    """One image per program. Grid: (rows,)."""
    image = tl.program_id(0)
    within = tl.arange(0, BLOCK)
    mask = within < row
    offsets = image.to(tl.int64) * row + within
    delta, grad, x0 = load_pixels(x_adv_ptr, grad_ptr, x0_ptr, offsets, mask)
    gg = tl.sum(grad * grad, axis=0)
    dg = tl.sum(delta * grad, axis=0)
    dd = tl.sum(delta * delta, axis=0)
    tl.store(moved_ptr + image, (gg > 0).to(tl.int8))
    if READ_STEP:
        step_size = tl.load(step_size_ptr)
    if READ_EPS:
        eps = tl.load(eps_ptr)
    store_step(delta, grad, x0, gg, dg, dd, out_ptr, low_ptr, offsets, mask, step_size, eps, lo, hi, HAS_LOW)


@triton.jit
def pgd_step_l2_sums_kernel(
    x_adv_ptr,  # as above
    grad_ptr,
    x0_ptr,
    partial_ptr,  # (rows * parts, 3) float64
    row,
    parts,
    BLOCK: tl.constexpr,
):
    """The three sums over one part of an image. Grid: (rows * parts,). No atomics: the same input gives the
    same bits.
    """
    program = tl.program_id(0)
    image = program // parts
    within = (program % parts) * BLOCK + tl.arange(0, BLOCK)
    mask = within < row
    delta, grad, _ = load_pixels(x_adv_ptr, grad_ptr, x0_ptr, image.to(tl.int64) * row + within, mask)
    tl.store(partial_ptr + 3 * program, tl.sum(grad * grad, axis=0))
    tl.store(partial_ptr + 3 * program + 1, tl.sum(delta * grad, axis=0))
    tl.store(partial_ptr + 3 * program + 2, tl.sum(delta * delta, axis=0))


@triton.jit
def pgd_step_l2_apply_kernel(
    x_adv_ptr,  # as above
    grad_ptr,
    x0_ptr,
    out_ptr,
    low_ptr,
    moved_ptr,
    partial_ptr,
    row,
    parts,
    step_size: tl.float64,
    eps: tl.float64,
    lo: tl.float64,
    hi: tl.float64,
    step_size_ptr,  # float64 scalars that replace the two; unused unless READ_STEP, READ_EPS
    eps_ptr,
    HAS_LOW: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,  # power of two >= parts
    READ_STEP: tl.constexpr,
    READ_EPS: tl.constexpr,
):
    """The step of one part of an image. Grid: (rows * parts,)."""
    program = tl.program_id(0)
    image = program // parts
    part = tl.arange(0, PARTS)
    sums_ptr = partial_ptr + 3 * (image * parts + part)
    gg = tl.sum(tl.load(sums_ptr, mask=part < parts, other=0.0), axis=0)
    dg = tl.sum(tl.load(sums_ptr + 1, mask=part < parts, other=0.0), axis=0)
    dd = tl.sum(tl.load(sums_ptr + 2, mask=part < parts, other=0.0), axis=0)
    within = (program % parts) * BLOCK + tl.arange(0, BLOCK)
    mask = within < row
    offsets = image.to(tl.int64) * row + within
    delta, grad, x0 = load_pixels(x_adv_ptr, grad_ptr, x0_ptr, offsets, mask)
    tl.store(moved_ptr + image, (gg > 0).to(tl.int8))  # programs of one image write one value
    if READ_STEP:
        step_size = tl.load(step_size_ptr)
    if READ_EPS:
        eps = tl.load(eps_ptr)
    store_step(delta, grad, x0, gg, dg, dd, out_ptr, low_ptr, offsets, mask, step_size, eps, lo, hi, HAS_LOW)


def pgd_step_l2(
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
    """Launch on the current stream; returns (x, low, moved), x and low with the layout of `x_adv`.

    All three tensors must be dense and of one memory order, with each image one block of memory.
    """
    out, low, moved = new_outputs(x_adv, low_dtype, x_adv.shape[0])
    if out.numel() == 0:
        return out, low, moved
    rows = x_adv.shape[0]
    row = out.numel() // rows
    inputs = (x_adv, grad, x0)
    outputs = (out, low, moved.view(torch.int8))
    scalars = (step_size, eps, lo, hi)
    held = device_sizes(x_adv, device_step_size, device_eps)
    with on_device_of(x_adv):
        if row <= LARGEST_IN_REGISTERS:
            block = triton.next_power_of_2(row)
            pgd_step_l2_kernel[(rows,)](
                *inputs,
                *outputs,
                row,
                *scalars,
                **held,
                HAS_LOW=low_dtype is not None,
                BLOCK=block,
                num_warps=max(1, min(16, block // 512)),
                enable_fp_fusion=False,
            )
            return out, low, moved
        parts = triton.cdiv(row, SPLIT_BLOCK)
        grid = (rows * parts,)
        partial = x_adv.new_empty(rows * parts, 3, dtype=torch.float64)
        pgd_step_l2_sums_kernel[grid](
            *inputs, partial, row, parts, BLOCK=SPLIT_BLOCK, num_warps=8, enable_fp_fusion=False
        )
        pgd_step_l2_apply_kernel[grid](
            *inputs,
            *outputs,
            partial,
            row,
            parts,
            *scalars,
            **held,
            HAS_LOW=low_dtype is not None,
            BLOCK=SPLIT_BLOCK,
            PARTS=triton.next_power_of_2(parts),
            num_warps=8,
            enable_fp_fusion=False,
        )
    return out, low, moved
