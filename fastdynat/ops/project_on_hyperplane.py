"""Projection of images onto hyperplanes within a box, the step of searches for a decision boundary."""

from typing import Any

import torch
from torch import Tensor

from fastdynat.errors import unknown_name
from fastdynat.ops._layout import images_together, one_order
from fastdynat.ops._register import register_operator
from fastdynat.ops._select import select
from fastdynat.ops._step import GRAD_DTYPES, IMAGE_DTYPES

NORMS = ("linf", "l2")
# Each step of Newton's method cuts (remaining distance) * slope to a quarter or less. Under L-inf that halves
# the bound on the distance: 64 steps exceed the precision of float64. Images need 4 to 8.
STEPS = 64


def _eager(x: Tensor, w: Tensor, value: Tensor, at: Tensor, l2: bool, lo: float, hi: float) -> Tensor:
    """The reference, in float64, with a fixed number of steps: a stopping test would wait for the device."""
    if x.numel() == 0:
        return torch.empty_like(x)
    shape = (-1, *[1] * (x.dim() - 1))

    def total(t: Tensor) -> Tensor:
        return t.reshape(len(t), -1).sum(1)

    start = x.clamp(lo, hi).double()
    c = value.double() + total(w.double() * (start - at.double()))
    largest = w.double().abs().reshape(len(w), -1).amax(1)
    usable = c.isfinite() & (largest > 0)
    target = torch.where(usable, c.abs() / largest, 0.0)
    direction = w.double() / largest.reshape(shape) * c.sign().reshape(shape)
    size = direction.abs()
    room = torch.where(direction > 0, start - lo, hi - start)
    t = torch.zeros_like(c)
    for _ in range(STEPS):
        move = t.reshape(shape) * size if l2 else t.reshape(shape)
        reached = total(size * torch.minimum(move, room))
        slope = total(torch.where(move < room, size * size if l2 else size, 0.0))
        missing = target - reached
        # A slope of 0 means that every entry is at its bound; 1e300 instead of infinity, as 0 * inf is NaN.
        t = t + torch.where(missing > 0, missing / slope, 0.0).clamp_max(1e300)
    move = t.reshape(shape) * (direction if l2 else direction.sign())
    z = torch.where(usable.reshape(shape) & (direction != 0), start - move, start)
    return torch.empty_like(x).copy_(z.clamp(lo, hi))


def _fake(x: Tensor, **_: Any) -> Tensor:
    return torch.empty_like(x)


IMPLEMENTATIONS = register_operator("project_on_hyperplane", eager=_eager, fake=_fake)


def project_on_hyperplane(
    x: Tensor,
    w: Tensor,
    value: Tensor,
    at: Tensor,
    *,
    norm: str = "linf",
    lo: float = 0.0,
    hi: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Return, per image, the point z in [lo, hi] nearest to x on the plane value + w . (z - at) = 0.

    z = clamp(x - t * s * sign(w), lo, hi) under "linf" and clamp(x - t * s * w, lo, hi) under "l2", where s
    is the side of the plane that x is on and t >= 0 the smallest multiplier that reaches the plane. The
    distance covered is a concave, piecewise linear function of t: Newton's method from t = 0 approaches the
    root from below and is exact once no further entry reaches its bound, without sorting or tolerances. If
    the plane does not meet the box, z is the point of the box closest to it: every entry with w != 0 at its
    bound. Source: Croce & Hein 2020 (arXiv 1907.02044); used by DyART, Xu et al. 2023 (arXiv 2302.03015).

    Entries of `x` outside the box are clipped to it first. Entries with w = 0 do not move. Where w is
    0 throughout, x is NaN somewhere, w, value or at is NaN or infinite somewhere, or w . (x - at) overflows
    float64, the image is returned as it is, clipped to the box; so is one that is on the plane already.
    Bounds may be infinite. Sums are in float64; the terms that Newton's method sums are products in the dtype
    of `x`: in float32 what is left of value + w . (z - at) is of the order of 1e-7 * sum|w| * (the largest
    move), as much as rounding z leaves.

    Args:
        x: the points to project, (N, ...), float32 or float64. Its memory layout is the result's where each
            image is one block of memory (contiguous, channels-last), else the result is contiguous; w and at
            are copied only where they are laid out differently.
        w: normals of the planes, i.e. gradients at `at`, shape of `x`, float32, float64, bfloat16 or float16.
        value: (N,), dtype of `x`: the linearised function at `at`.
        at: where it was linearised, shape and dtype of `x`; `x` itself and other points are both used.
        norm: "linf" or "l2": the distance that is minimised.
        lo, hi: the box, lo <= hi.
        backend: "auto" or one of `fastdynat.ops.BACKENDS`.

    Returns:
        A new tensor, shape and dtype of `x`, detached.

    Raises:
        ValueError: shapes, dtypes, devices or bounds do not fit; UserError for an unknown norm or backend.
        RuntimeError: the backend asked for cannot run here.
    """
    _check(x, w, value, at, norm, lo, hi)
    run = select("project_on_hyperplane", IMPLEMENTATIONS, backend, x)
    x, w, at = one_order(images_together(x.detach()), w.detach(), at.detach())
    return run(x, w, value.detach().contiguous(), at, norm == "l2", float(lo), float(hi))


def _check(x: Tensor, w: Tensor, value: Tensor, at: Tensor, norm: str, lo: float, hi: float) -> None:
    op = "project_on_hyperplane"
    if norm not in NORMS:
        raise unknown_name("norm", norm, NORMS)
    if x.dim() == 0:
        raise ValueError(
            f"{op}: x needs a first dimension of images, got a scalar; use x[None] for one image"
        )
    for name, tensor, shape in (("w", w, x.shape), ("at", at, x.shape), ("value", value, x.shape[:1])):
        if tensor.shape != shape:
            raise ValueError(
                f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)} to go with x"
            )
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} but x is on {x.device}")
    if x.dtype not in IMAGE_DTYPES:
        raise ValueError(f"{op}: x must be float32 or float64, got {x.dtype}")
    for name, tensor in (("at", at), ("value", value)):
        if tensor.dtype != x.dtype:
            raise ValueError(f"{op}: {name} is {tensor.dtype} but x is {x.dtype}; use {name}.to(x.dtype)")
    if w.dtype not in GRAD_DTYPES:
        raise ValueError(f"{op}: w must be float32, float64, bfloat16 or float16, got {w.dtype}")
    if not lo <= hi:
        raise ValueError(f"{op}: lo must not exceed hi, got lo={lo} and hi={hi}")
