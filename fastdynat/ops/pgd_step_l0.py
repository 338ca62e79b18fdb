"""The L0 PGD step: ascend along the gradient, keep the pixels that moved furthest, reset all others."""

import torch
from torch import Tensor

from fastdynat.ops._register import register_operator
from fastdynat.ops._step import check_step, empty_point, run_step
from fastdynat.ops.pgd_step_l2 import finite_gradient

OP = "pgd_step_l0"


def _eager(
    x_adv: Tensor, grad: Tensor, x0: Tensor, step_size: float, pixels: int, lo: float, hi: float
) -> Tensor:
    """The reference."""
    if x_adv.numel() == 0:
        return torch.empty_like(x_adv)
    g = finite_gradient(grad, x_adv.dtype).double()
    length = g.abs().sum((1, 2, 3), keepdim=True)
    z = (x_adv.double() + step_size / torch.where(length > 0, length, 1.0) * g).to(x_adv.dtype).clamp(lo, hi)
    score = (z - x0).square().sum(1, keepdim=True).nan_to_num(0.0)
    # A stable sort keeps pixels of equal score in row-major order.
    order = score.flatten(1).sort(stable=True, dim=1, descending=True).indices
    kept = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :pixels], True).reshape(score.shape)
    return torch.empty_like(x_adv).copy_(torch.where(kept | z.isnan(), z, x0))


IMPLEMENTATIONS = register_operator(OP, eager=_eager, fake=empty_point)


def pgd_step_l0(
    x_adv: Tensor,
    grad: Tensor,
    x0: Tensor,
    *,
    step_size: float,
    pixels: int,
    lo: float = 0.0,
    hi: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Step along grad / ||grad||_1, clip, keep the `pixels` pixels furthest from x0, reset the others to x0.

    All channels of a pixel go together. The distance of a pixel is the sum over channels of the squared
    displacement from x0 after clipping to [lo, hi], in the dtype of `x_adv`; of pixels at equal distance the
    first in row-major order are kept. Kernels select exactly, by bisection on the bits of the distances.
    Source: PGD-L0 of Croce & Hein 2019 (arXiv 1909.05040). The authors' code ranks pixels by how much nearer
    they are than x0 to the point before clipping, which differs only for clipped pixels. The result is a new,
    detached tensor.

    Gradient entries that are NaN count as 0, infinite ones as the largest finite value (float64 images:
    1e150, and less than 1e-150 is 0). Where all are 0 the image makes no step. A pixel with a NaN in `x_adv`
    or `x0` counts as not displaced, and the NaN stays. A negative `step_size` descends. Each backend sums
    the norm in float64 in its own order, so that pixels at equal distance up to rounding may be ranked
    differently.

    Args:
        x_adv: the current points, (N, C, H, W), float32 or float64, in [lo, hi]. Its memory layout is the
            result's where each image is one block of memory (contiguous, channels-last), else the result is
            contiguous; grad and x0 are copied only where they are laid out differently.
        grad: gradient at `x_adv`, same shape, float32, float64, bfloat16 or float16.
        x0: the clean images, shape and dtype of `x_adv`.
        step_size: L1 length of the move before clipping, in units of the pixel range.
        pixels: number of pixels that may differ from x0, >= 0.
        lo, hi: the pixel range, lo <= hi.
        backend: "auto" or one of `fastdynat.ops.BACKENDS`.

    Raises:
        ValueError: shapes, dtypes, devices or bounds do not fit; UserError for an unknown backend.
        RuntimeError: the backend asked for cannot run here.
    """
    if x_adv.dim() != 4:
        raise ValueError(f"{OP}: x_adv must be (N, C, H, W), got shape {tuple(x_adv.shape)}")
    check_step(OP, x_adv, grad, x0, step_size, 0.0, lo, hi)
    if pixels < 0:
        raise ValueError(f"{OP}: pixels must be >= 0, got {pixels}")
    arguments = (float(step_size), pixels, float(lo), float(hi))
    return run_step(OP, IMPLEMENTATIONS, backend, (x_adv, grad, x0), arguments)
