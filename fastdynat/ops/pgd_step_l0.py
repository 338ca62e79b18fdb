"""The L0 PGD step: ascend along the gradient, then keep the pixels that have come furthest and reset the
others.
"""

import torch
from torch import Tensor

from fastdynat.ops._layout import images_together, one_order
from fastdynat.ops._register import register
from fastdynat.ops._select import select
from fastdynat.ops._step import check_step
from fastdynat.ops.pgd_step_l2 import finite_gradient


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
    # A stable order is by index where the scores are equal.
    order = score.flatten(1).sort(stable=True, dim=1, descending=True).indices
    kept = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :pixels], True).reshape(score.shape)
    return torch.empty_like(x_adv).copy_(torch.where(kept | z.isnan(), z, x0))


def _fake(
    x_adv: Tensor, grad: Tensor, x0: Tensor, step_size: float, pixels: int, lo: float, hi: float
) -> Tensor:
    return torch.empty_like(x_adv)


IMPLEMENTATIONS = register(
    "pgd_step_l0",
    "(Tensor x_adv, Tensor grad, Tensor x0, float step_size, int pixels, float lo, float hi) -> Tensor",
    eager=_eager,
    fake=_fake,
    module="pgd_step_l0",
)


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
    """Return x_adv + step_size * grad / ||grad||_1, clipped, in the `pixels` pixels where it is furthest from
    x0.

    All channels of a pixel go together; "furthest" is by the sum of the squares of what is left of the
    displacement after clipping to [lo, hi], in the dtype of `x_adv`, and of equal pixels those first in
    row-major order are kept. All other pixels are those of x0. Exact selection, not by sorting but by
    bisection on the bits of the distances. PGD-L0 of Croce & Hein 2019 (arXiv 1909.05040); the authors' code
    ranks by the squared distance to the point before clipping that a pixel gains over x0 instead, which
    differs only for pixels that are clipped.

    Gradient entries that are NaN count as 0, infinite ones as the largest finite value (float64 images:
    1e150, and less than 1e-150 is 0). Where all are 0 the image makes no step. A pixel with a NaN in `x_adv`
    or `x0` counts as not displaced, and the NaN stays. A negative `step_size` descends. The norm is summed in
    float64, in another order in each backend: pixels whose distances are equal but for rounding may be told
    apart differently.

    Args:
        x_adv: the current points, (N, C, H, W), float32 or float64, in [lo, hi]. Its memory layout is the
            result's where each image is one block of memory (contiguous, channels-last), else the result is
            contiguous; grad and x0 are copied only where they are laid out differently.
        grad: gradient at `x_adv`, same shape, float32, float64, bfloat16 or float16.
        x0: the clean images, shape and dtype of `x_adv`.
        step_size: L1 length of the move before clipping, in units of the pixel range.
        pixels: how many may differ from x0, >= 0.
        lo, hi: the pixel range, lo <= hi.
        backend: "auto" or one of `fastdynat.ops.BACKENDS`.

    Raises:
        ValueError: shapes, dtypes, devices or bounds do not fit; UserError for an unknown backend.
        RuntimeError: the backend asked for cannot run here.
    """
    if x_adv.dim() != 4:
        raise ValueError(f"pgd_step_l0: x_adv must be (N, C, H, W), got shape {tuple(x_adv.shape)}")
    check_step("pgd_step_l0", x_adv, grad, x0, step_size, 0.0, lo, hi)
    if pixels < 0:
        raise ValueError(f"pgd_step_l0: pixels must be >= 0, got {pixels}")
    run = select("pgd_step_l0", IMPLEMENTATIONS, backend, x_adv)
    x_adv, grad, x0 = one_order(images_together(x_adv.detach()), grad.detach(), x0.detach())
    return run(x_adv, grad, x0, float(step_size), pixels, float(lo), float(hi))
