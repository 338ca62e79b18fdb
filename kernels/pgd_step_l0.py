"""The L0 PGD step: one program per image, pixels selected by bisection on the bits of their distances."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdynat.kernels._launch import on_device_of, registers_for
from fastdynat.kernels._step import clamp_pixels, load_gradient
from fastdynat.kernels.pgd_step_l1 import as_float

LARGEST_IN_REGISTERS = 4096  # pixels of an image whose distances fit
BLOCK = 2048  # pixels per block of a larger one, whose distances are computed again in every pass


@triton.jit
def moved(x_adv_ptr, grad_ptr, at, mask, scale, lo, hi):
    """The new point before the selection."""
    x = tl.load(x_adv_ptr + at, mask=mask, other=0.0)
    grad = load_gradient(grad_ptr, at, mask, x.dtype)
    x = (x.to(tl.float64) + scale * grad.to(tl.float64)).to(x.dtype)
    return clamp_pixels(x, lo, hi)


@triton.jit
def score_of(x_adv_ptr, grad_ptr, x0_ptr, at, stride, mask, scale, lo, hi, CHANNELS: tl.constexpr):
    """Squared displacement of each pixel from x0: 0 for a NaN, -1 where there is no pixel."""
    total = tl.zeros(at.shape, x_adv_ptr.dtype.element_ty)
    for channel in range(CHANNELS):
        here = at + channel * stride
        d = moved(x_adv_ptr, grad_ptr, here, mask, scale, lo, hi) - tl.load(
            x0_ptr + here, mask=mask, other=0.0
        )
        total += d * d
    return tl.where(mask, tl.where(total == total, total, 0.0), -1.0)


@triton.jit
def pgd_step_l0_kernel(
    x_adv_ptr,  # (rows, row) float32 or float64, dense; channel c of pixel p at c * stride + p * pixel_stride
    grad_ptr,  # (rows, row) any float, in the same order
    x0_ptr,  # (rows, row) dtype of x_adv, in the same order
    out_ptr,  # (rows, row) dtype of x_adv; not aliased with the inputs
    pixels,
    stride,  # of the channels
    pixel_stride,
    step_size: tl.float64,  # an unannotated float would arrive rounded to float32
    wanted,
    lo: tl.float64,
    hi: tl.float64,
    CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,  # blocks of pixels in an image; the scores of a single one stay in registers
    BLOCK: tl.constexpr,
):
    """Grid: (rows,)."""
    dtype: tl.constexpr = x_adv_ptr.dtype.element_ty
    bits_type: tl.constexpr = tl.int64 if dtype == tl.float64 else tl.int32
    top: tl.constexpr = 62 if dtype == tl.float64 else 30
    base = tl.program_id(0).to(tl.int64) * pixels * CHANNELS
    x_adv_ptr += base
    grad_ptr += base
    x0_ptr += base
    out_ptr += base
    block = tl.arange(0, BLOCK)
    lo = tl.full((1,), lo, dtype)
    hi = tl.full((1,), hi, dtype)

    length = tl.full((), 0.0, tl.float64)
    for part in range(PARTS * CHANNELS):
        at = part * BLOCK + block
        length += tl.sum(
            tl.abs(load_gradient(grad_ptr, at, at < pixels * CHANNELS, dtype)).to(tl.float64), axis=0
        )
    scale = tl.where(length > 0, step_size / tl.where(length > 0, length, 1.0), 0.0)

    # Each loop over parts below computes the scores again, unless there is a single part.
    pixel = block
    at = pixel * pixel_stride
    score = score_of(x_adv_ptr, grad_ptr, x0_ptr, at, stride, pixel < pixels, scale, lo, hi, CHANNELS)

    # The largest threshold that at least `wanted` pixels reach; the last round counts the pixels above it.
    threshold_bits = tl.zeros((1,), bits_type)
    one = tl.full((1,), 1, bits_type)
    found = tl.full((), 0, tl.int32)
    for step in range(top + 2):
        shift = tl.maximum(top - step, 0)
        candidate = threshold_bits | tl.where(step <= top, one << shift.to(bits_type), 0)
        threshold = as_float(candidate, dtype)
        found = tl.full((), 0, tl.int32)
        for part in range(PARTS):
            if PARTS > 1:
                pixel = part * BLOCK + block
                at = pixel * pixel_stride
                score = score_of(
                    x_adv_ptr, grad_ptr, x0_ptr, at, stride, pixel < pixels, scale, lo, hi, CHANNELS
                )
            reached = tl.where(step <= top, score >= threshold, score > threshold)
            found += tl.sum(reached.to(tl.int32), axis=0)
        threshold_bits = tl.where((found >= wanted) & (step <= top), candidate, threshold_bits)
    threshold = as_float(threshold_bits, dtype)

    # Of the pixels at the threshold keep the first `left`: up to the last index with fewer before it.
    left = wanted - found
    last = tl.zeros((1,), tl.int32)
    for step in range(31):
        candidate = last | (tl.full((1,), 1, tl.int32) << (30 - step))
        before = tl.full((), 0, tl.int32)
        for part in range(PARTS):
            if PARTS > 1:
                pixel = part * BLOCK + block
                at = pixel * pixel_stride
                score = score_of(
                    x_adv_ptr, grad_ptr, x0_ptr, at, stride, pixel < pixels, scale, lo, hi, CHANNELS
                )
            before += tl.sum(((score == threshold) & (pixel < candidate)).to(tl.int32), axis=0)
        last = tl.where(before < left, candidate, last)
    last = tl.where(left > 0, last, -1)

    for part in range(PARTS):
        if PARTS > 1:
            pixel = part * BLOCK + block
            at = pixel * pixel_stride
            score = score_of(x_adv_ptr, grad_ptr, x0_ptr, at, stride, pixel < pixels, scale, lo, hi, CHANNELS)
        kept = (score > threshold) | ((score == threshold) & (pixel <= last))
        mask = pixel < pixels
        for channel in range(CHANNELS):
            here = at + channel * stride
            x = moved(x_adv_ptr, grad_ptr, here, mask, scale, lo, hi)
            x0 = tl.load(x0_ptr + here, mask=mask, other=0.0)
            tl.store(out_ptr + here, tl.where(kept | (x != x), x, x0), mask=mask)


def pgd_step_l0(
    x_adv: Tensor, grad: Tensor, x0: Tensor, step_size: float, pixels: int, lo: float, hi: float
) -> Tensor:
    """Launch the kernel on the current stream; returns the new point, laid out as `x_adv`.

    All three tensors (N, C, H, W) must be contiguous, or all channels-last.
    """
    out = torch.empty_like(x_adv)
    if out.numel() == 0:
        return out
    channels, count = x_adv.shape[1], x_adv.shape[2] * x_adv.shape[3]
    channel_stride, pixel_stride = (count, 1) if x_adv.is_contiguous() else (1, channels)
    block = triton.next_power_of_2(count) if count <= LARGEST_IN_REGISTERS else BLOCK
    num_warps = max(1, min(16, block // 256))
    with on_device_of(x_adv):
        pgd_step_l0_kernel[(out.shape[0],)](
            x_adv,
            grad,
            x0,
            out,
            count,
            channel_stride,
            pixel_stride,
            step_size,
            min(pixels, count),
            lo,
            hi,
            CHANNELS=channels,
            PARTS=triton.cdiv(count, block),
            BLOCK=block,
            num_warps=num_warps,
            enable_fp_fusion=False,
            **registers_for(x_adv.dtype, num_warps),
        )
    return out
