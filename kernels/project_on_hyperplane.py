"""Projection on a hyperplane inside a box by Newton's method: one program per image."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdynat.kernels._launch import on_device_of, registers_for
from fastdynat.kernels._rows import rounded_quotient

LARGEST_IN_REGISTERS = 4096  # elements of an image
BLOCK = 2048  # elements at a time of a larger one, which is read again in every step
STEPS = 64  # what is missing falls so fast that images need 4 to 8: see the reference in fastdynat.ops


@triton.jit
def clip(x, lo, hi):
    """Clamp to the box; a NaN stays."""
    x = tl.where(x < lo, lo, x)
    return tl.where(x > hi, hi, x)


@triton.jit
def load_entries(x_ptr, w_ptr, offsets, mask, lo, hi):
    """Load (x clamped to the box, w in the dtype of x)."""
    x = clip(tl.load(x_ptr + offsets, mask=mask, other=0.0), lo, hi)
    w = tl.load(w_ptr + offsets, mask=mask, other=0.0)
    if w.dtype.primitive_bitwidth == 16:
        w = w.to(tl.float32)  # exact; there is no direct conversion from bfloat16 to float64
    return x, w.to(x.dtype)


@triton.jit
def power_of_two_below(x):
    """The largest power of two that does not exceed x > 0: dividing by it is exact."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True) & 0x7FF0000000000000
        unit = tl.where(bits == 0, 0x0010000000000000, bits).to(tl.float64, bitcast=True)
    else:
        bits = x.to(tl.int32, bitcast=True) & 0x7F800000
        unit = tl.where(bits == 0, 0x00800000, bits).to(tl.int32).to(tl.float32, bitcast=True)
    return unit


@triton.jit
def add_reached(x, direction, t, lo, hi, L2: tl.constexpr):
    """The distance that multiplier t covers towards the plane, and its slope in t, in float64."""
    size = tl.abs(direction)
    room = tl.where(direction > 0, x - lo, hi - x)
    move = t
    rate = size
    if L2:
        move = t * size
        rate = size * size
    free = move < room
    way = tl.where(
        direction == 0, 0.0, size * tl.where(free, move, room)
    )  # 0 * infinity in a box without bounds
    reached = tl.sum(way.to(tl.float64), axis=0)
    slope = tl.sum(tl.where(free, rate, 0.0).to(tl.float64), axis=0)
    return reached, slope


@triton.jit
def store_moved(x, direction, t, out_ptr, offsets, mask, lo, hi, L2: tl.constexpr):
    """Store the projected entries."""
    # Not multiplied: t may be infinite, or 0 because of a direction that is NaN. The interpreter wants a
    # block to compare with.
    still = (direction == 0) | (tl.zeros_like(direction) == t)
    by = t * tl.where(direction > 0, 1.0, -1.0).to(tl.float64)
    if L2:
        by = t * tl.where(still, 1.0, direction.to(tl.float64))
    tl.store(
        out_ptr + offsets, tl.where(still, x, clip((x.to(tl.float64) - by).to(x.dtype), lo, hi)), mask=mask
    )


@triton.jit
def project_on_hyperplane_kernel(
    x_ptr,  # (rows, row) float32 or float64, dense
    w_ptr,  # (rows, row) any float, in the same order
    value_ptr,  # (rows,) dtype of x
    at_ptr,  # (rows, row) dtype of x, in the same order
    out_ptr,  # (rows, row) dtype of x; not aliased with the inputs
    row,
    lo: tl.float64,  # an unannotated float would arrive rounded to float32
    hi: tl.float64,
    steps,
    L2: tl.constexpr,
    PARTS: tl.constexpr,  # blocks in an image; a single one stays in registers
    BLOCK: tl.constexpr,
):
    """Grid: (rows,)."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    image = tl.program_id(0)
    base = image.to(tl.int64) * row
    lo = tl.full((1,), lo, dtype)
    hi = tl.full((1,), hi, dtype)
    within = tl.arange(0, BLOCK)

    product = tl.load(value_ptr + image).to(tl.float64)
    largest = tl.full((), 0.0, dtype)
    if PARTS == 1:
        mask = within < row
        x, w = load_entries(x_ptr, w_ptr, base + within, mask, lo, hi)
        at = tl.load(at_ptr + base + within, mask=mask, other=0.0)
        # Where there is no pixel w is 0, but x is in the box, which need not hold a number that 0 can be
        # multiplied by.
        terms = tl.where(mask, w.to(tl.float64) * (x.to(tl.float64) - at.to(tl.float64)), 0.0)
        product += tl.sum(terms, axis=0)
        largest = tl.max(tl.abs(w), axis=0)
    else:
        for part in range(PARTS):
            mask = part * BLOCK + within < row
            x, w = load_entries(x_ptr, w_ptr, base + part * BLOCK + within, mask, lo, hi)
            at = tl.load(at_ptr + base + part * BLOCK + within, mask=mask, other=0.0)
            terms = tl.where(mask, w.to(tl.float64) * (x.to(tl.float64) - at.to(tl.float64)), 0.0)
            product += tl.sum(terms, axis=0)
            largest = tl.maximum(largest, tl.max(tl.abs(w), axis=0))

    # As Plane in csrc/: x moves against w times the side it is on, scaled so that squares stay in range.
    usable = (largest > 0) & (tl.abs(product) < float("inf"))
    unit = power_of_two_below(tl.where(usable, largest, 1.0).to(dtype))
    factor = rounded_quotient(tl.where(product < 0, -1.0, 1.0).to(dtype), unit)
    target = tl.where(usable, tl.abs(product) / unit.to(tl.float64), 0.0)
    if PARTS == 1:
        w = w * factor

    # Newton's method, as in csrc/.
    t = tl.full((), 0.0, tl.float64)
    slope_before = tl.full((), -1.0, tl.float64)
    left = tl.where(target > 0, steps, 0)
    while left > 0:
        at_t = tl.minimum(t, 1e38).to(dtype)  # finite, so that it can be multiplied by 0
        if PARTS == 1:
            reached, slope = add_reached(x, w, at_t, lo, hi, L2)
        else:
            reached = tl.full((), 0.0, tl.float64)
            slope = tl.full((), 0.0, tl.float64)
            for part in range(PARTS):
                mask = part * BLOCK + within < row
                x, w = load_entries(x_ptr, w_ptr, base + part * BLOCK + within, mask, lo, hi)
                more_reached, more_slope = add_reached(x, w * factor, at_t, lo, hi, L2)
                reached += more_reached
                slope += more_slope
        missing = target - reached
        climbs = (missing > 0) & (slope > 0)
        further = at_t.to(tl.float64) + missing / tl.where(slope > 0, slope, 1.0)
        # Without a slope the box ends before the plane: all entries go to their bounds.
        t = tl.where(climbs, further, tl.where(missing > 0, float("inf"), t))
        left = tl.where(climbs & (slope != slope_before), left - 1, 0)
        slope_before = slope

    if PARTS == 1:
        store_moved(x, w, t, out_ptr, base + within, within < row, lo, hi, L2)
    else:
        for part in range(PARTS):
            mask = part * BLOCK + within < row
            x, w = load_entries(x_ptr, w_ptr, base + part * BLOCK + within, mask, lo, hi)
            store_moved(x, w * factor, t, out_ptr, base + part * BLOCK + within, mask, lo, hi, L2)


def project_on_hyperplane(
    x: Tensor, w: Tensor, value: Tensor, at: Tensor, l2: bool, lo: float, hi: float
) -> Tensor:
    """Launch the kernel on the current stream; returns the projection, laid out as `x`.

    x, w and at must be dense and of one memory order, with each image one block of memory.
    """
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    row = out.numel() // out.shape[0]
    held = row <= LARGEST_IN_REGISTERS
    block = triton.next_power_of_2(row) if held else BLOCK
    with on_device_of(x):
        project_on_hyperplane_kernel[(out.shape[0],)](
            x,
            w,
            value,
            at,
            out,
            row,
            lo,
            hi,
            STEPS,
            L2=l2,
            PARTS=triton.cdiv(row, block),
            BLOCK=block,
            num_warps=max(1, min(16, block // 256)),
            enable_fp_fusion=False,
            **registers_for(x.dtype),
        )
    return out
