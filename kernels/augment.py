"""Gather, crop, flip and convert a batch as one kernel: one byte read and one number written per element."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdynat.kernels._launch import on_device_of

BLOCK = 1024


@triton.jit
def augment_kernel(
    store_ptr,  # (M, C, H, W) uint8
    indices_ptr,  # (N,) int64
    shifts_ptr,  # (2, N) int64, row stride given; unused unless CROP
    flips_ptr,  # (N,) uint8, unused unless FLIP
    out_ptr,  # (N, C, H, W) any float, or (N, H, W, C) if CHANNELS_LAST
    stored,  # M
    shift_stride,
    pad,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CROP: tl.constexpr,
    FLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write image indices[n] of the store, zero-padded, cropped, mirrored and divided by 255.

    Grid: (blocks per image, N), flattened with the blocks of an image side by side. An image whose index or
    shift is out of range is NaN, and nothing is read for it.
    """
    row: tl.constexpr = CHANNELS * HEIGHT * WIDTH
    blocks: tl.constexpr = (row + BLOCK - 1) // BLOCK
    n = tl.program_id(0) // blocks
    at = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    if CHANNELS_LAST:
        c = at % CHANNELS
        x = at // CHANNELS % WIDTH
        y = at // (CHANNELS * WIDTH)
    else:
        x = at % WIDTH
        y = at // WIDTH % HEIGHT
        c = at // (WIDTH * HEIGHT)

    index = tl.load(indices_ptr + n)
    fits = (index >= 0) & (index < stored)
    if FLIP:
        x = tl.where(tl.load(flips_ptr + n) != 0, WIDTH - 1 - x, x)
    if CROP:
        top = tl.load(shifts_ptr + n)
        left = tl.load(shifts_ptr + shift_stride + n)
        fits = fits & (top >= 0) & (top <= 2 * pad) & (left >= 0) & (left <= 2 * pad)
        y = y + (top - pad)
        x = x + (left - pad)
    inside = (at < row) & (y >= 0) & (y < HEIGHT) & (x >= 0) & (x < WIDTH)
    # Not `fits & inside`: the interpreter of Triton 3.9 makes int64 of one truth value that is spread over a
    # block.
    inside = tl.where(fits, inside, False)
    pixel = tl.load(store_ptr + index * row + (c * HEIGHT + y) * WIDTH + x, mask=inside, other=0)

    dtype = out_ptr.dtype.element_ty
    # True division: a product with 1/255 has other last bits.
    if dtype == tl.float64:
        unit = pixel.to(tl.float64) / 255.0
    else:
        unit = tl.div_rn(pixel.to(tl.float32), tl.full((1,), 255.0, tl.float32))
    unit = tl.where(fits, unit, float("nan")).to(dtype)
    tl.store(out_ptr + n.to(tl.int64) * row + at, unit, mask=at < row)


def augment(
    images: Tensor,
    indices: Tensor,
    shifts: Tensor | None,
    flips: Tensor | None,
    pad: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """Launch the kernel on the current stream; returns the batch.

    images, indices, flips and the rows of shifts must be contiguous, an image below 2^31 elements.
    """
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    _, channels, height, width = images.shape
    shape = (indices.shape[0], channels, height, width)
    out = torch.empty(shape, dtype=dtype, device=images.device, memory_format=memory_format)
    if out.numel() == 0:
        return out
    with on_device_of(images):
        augment_kernel[(shape[0] * triton.cdiv(channels * height * width, BLOCK),)](
            images,
            indices,
            shifts if shifts is not None else indices,
            flips.view(torch.uint8) if flips is not None else images,
            out,
            images.shape[0],
            shifts.stride(0) if shifts is not None else 0,
            pad,
            CHANNELS=channels,
            HEIGHT=height,
            WIDTH=width,
            CHANNELS_LAST=channels_last,
            CROP=shifts is not None,
            FLIP=flips is not None,
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )
    return out
