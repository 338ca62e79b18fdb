"""The L1 PGD step: one program per image, selection and projection by bisection on the bits of floats."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdynat.kernels._launch import on_device_of, registers_for
from fastdynat.kernels._step import clamp_pixels, device_sizes, load_gradient

LARGEST_IN_REGISTERS = 8192  # elements of an image
BLOCK = 4096  # elements per block of a larger one, which is read again in every pass


@triton.jit
def as_float(bits, dtype: tl.constexpr):
    """The non-negative float with these bits, of int32 or int64."""
    return bits.to(dtype, bitcast=True)


@triton.jit
def load_delta(x_adv_ptr, x0_ptr, grad, threshold, move, offsets, mask):
    """(difference to x0 after the step, x0)."""
    x_adv = tl.load(x_adv_ptr + offsets, mask=mask, other=0.0)
    x0 = tl.load(x0_ptr + offsets, mask=mask, other=0.0)
    by = tl.where(grad > 0, move, -move)
    by = tl.where((tl.abs(grad) >= threshold) & (grad != 0), by, 0.0)
    return (x_adv.to(tl.float64) - x0.to(tl.float64) + by).to(x_adv.dtype), x0


@triton.jit
def kept(delta, x0, tau, lo, hi):
    """The projection of |delta| at multiplier tau; 0 for a NaN."""
    size = tl.abs(delta)
    room = tl.where(delta > 0, hi - x0, x0 - lo)
    length = tl.where(size > tau, size - tau, 0.0)
    length = tl.where(length > room, room, length)
    return tl.where(length > 0, length, 0.0)


@triton.jit
def store_point(delta, x0, tau, lo, hi, out_ptr, offsets, mask):
    """Store the projected point; a NaN stays."""
    length = kept(delta, x0, tau, lo, hi)
    x = x0 + tl.where(delta > 0, length, -length)
    x = clamp_pixels(x, lo, hi)
    tl.store(out_ptr + offsets, tl.where(delta == delta, x, delta), mask=mask)


@triton.jit
def pgd_step_l1_kernel(
    x_adv_ptr,  # (rows, row) float32 or float64, dense
    grad_ptr,  # (rows, row) any float, in the same order
    x0_ptr,  # (rows, row) dtype of x_adv, in the same order
    out_ptr,  # (rows, row) dtype of x_adv; not aliased with the inputs
    row,
    step_size: tl.float64,  # an unannotated float would arrive rounded to float32
    eps: tl.float64,
    count,
    lo: tl.float64,
    hi: tl.float64,
    step_size_ptr,  # float64 scalars that replace the two; unused unless READ_STEP, READ_EPS
    eps_ptr,
    PARTS: tl.constexpr,  # blocks in an image; a single one stays in registers
    BLOCK: tl.constexpr,
    READ_STEP: tl.constexpr,
    READ_EPS: tl.constexpr,
):
    """Grid: (rows,)."""
    dtype: tl.constexpr = x_adv_ptr.dtype.element_ty
    bits_type: tl.constexpr = tl.int64 if dtype == tl.float64 else tl.int32
    top: tl.constexpr = 62 if dtype == tl.float64 else 30
    base = tl.program_id(0).to(tl.int64) * row
    within = tl.arange(0, BLOCK)
    if READ_STEP:
        step_size = tl.load(step_size_ptr)
    if READ_EPS:
        eps = tl.load(eps_ptr)
    lo = tl.full((1,), lo, dtype)
    hi = tl.full((1,), hi, dtype)

    # The largest threshold that at least `count` nonzero gradients reach.
    if PARTS == 1:
        mask = within < row
        grad = load_gradient(grad_ptr, base + within, mask, dtype)
    threshold_bits = tl.zeros((1,), bits_type)
    one = tl.full((1,), 1, bits_type)
    chosen = 0
    for step in range(top + 2):
        # The last round counts at the threshold that was found.
        shift = tl.maximum(top - step, 0)
        candidate = threshold_bits | tl.where(step <= top, one << shift.to(bits_type), 0)
        threshold = as_float(candidate, dtype)
        chosen = tl.full((), 0, tl.int32)
        if PARTS == 1:
            chosen += tl.sum(((tl.abs(grad) >= threshold) & (grad != 0)).to(tl.int32), axis=0)
        else:
            for part in range(PARTS):
                offsets = part * BLOCK + within
                grad = load_gradient(grad_ptr, base + offsets, offsets < row, dtype)
                chosen += tl.sum(((tl.abs(grad) >= threshold) & (grad != 0)).to(tl.int32), axis=0)
        threshold_bits = tl.where(chosen >= count, candidate, threshold_bits)
    threshold = as_float(threshold_bits, dtype)
    move = step_size / tl.maximum(chosen, 1).to(tl.float64)

    # The largest multiplier at which the point is still outside the ball.
    if PARTS == 1:
        delta, x0 = load_delta(x_adv_ptr, x0_ptr, grad, threshold, move, base + within, mask)
    tau_bits = tl.zeros((1,), bits_type)
    outside = tl.zeros((1,), tl.int32)
    for step in range(top + 2):
        # The first round tests tau = 0: whether the point is outside at all.
        shift = tl.minimum(top + 1 - step, top)
        candidate = tau_bits | tl.where(step > 0, one << shift.to(bits_type), 0)
        tau = as_float(candidate, dtype)
        length = tl.full((), 0.0, tl.float64)
        if PARTS == 1:
            length += tl.sum(tl.where(mask, kept(delta, x0, tau, lo, hi), 0.0).to(tl.float64), axis=0)
        else:
            for part in range(PARTS):
                offsets = part * BLOCK + within
                inside = offsets < row
                grad = load_gradient(grad_ptr, base + offsets, inside, dtype)
                delta, x0 = load_delta(x_adv_ptr, x0_ptr, grad, threshold, move, base + offsets, inside)
                length += tl.sum(tl.where(inside, kept(delta, x0, tau, lo, hi), 0.0).to(tl.float64), axis=0)
        outside = tl.where(length > eps, tl.full((1,), 1, tl.int32), tl.where(step == 0, 0, outside))
        tau_bits = tl.where(length > eps, candidate, tau_bits)
    tau = as_float(tl.where(outside > 0, tau_bits + 1, tau_bits), dtype)

    if PARTS == 1:
        store_point(delta, x0, tau, lo, hi, out_ptr, base + within, mask)
    else:
        for part in range(PARTS):
            offsets = part * BLOCK + within
            inside = offsets < row
            grad = load_gradient(grad_ptr, base + offsets, inside, dtype)
            delta, x0 = load_delta(x_adv_ptr, x0_ptr, grad, threshold, move, base + offsets, inside)
            store_point(delta, x0, tau, lo, hi, out_ptr, base + offsets, inside)


def pgd_step_l1(
    x_adv: Tensor,
    grad: Tensor,
    x0: Tensor,
    step_size: float,
    eps: float,
    count: int,
    lo: float,
    hi: float,
    device_step_size: Tensor | None = None,
    device_eps: Tensor | None = None,
) -> Tensor:
    """Launch the kernel on the current stream; returns the new point, laid out as `x_adv`.

    All three tensors must be dense and of one memory order, with each image one block of memory.
    """
    out = torch.empty_like(x_adv)
    if out.numel() == 0:
        return out
    row = out.numel() // out.shape[0]
    block = triton.next_power_of_2(row) if row <= LARGEST_IN_REGISTERS else BLOCK
    parts = triton.cdiv(row, block)
    # In float64, 16 elements a thread and the loop's variables take more than 128 registers.
    spread = parts > 1 and x_adv.dtype == torch.float64
    num_warps = 16 if spread else max(1, min(16, block // 512))
    with on_device_of(x_adv):
        pgd_step_l1_kernel[(out.shape[0],)](
            x_adv,
            grad,
            x0,
            out,
            row,
            step_size,
            eps,
            count,
            lo,
            hi,
            PARTS=parts,
            BLOCK=block,
            **device_sizes(x_adv, device_step_size, device_eps),
            num_warps=num_warps,
            enable_fp_fusion=False,
            **(registers_for(x_adv.dtype) if spread else {}),
        )
    return out
