"""The L1 PGD step: ascend along the largest gradient entries, project onto the ball within the pixel
range.
"""

import torch
from torch import Tensor

from fastdynat.ops._layout import images_together, one_order
from fastdynat.ops._register import register
from fastdynat.ops._select import select
from fastdynat.ops._step import check_images, check_step
from fastdynat.ops.pgd_step_l2 import finite_gradient

HALVINGS = 64  # of the interval of the multiplier: as many as float64 can tell apart


def _eager(
    x_adv: Tensor, grad: Tensor, x0: Tensor, step_size: float, eps: float, count: int, lo: float, hi: float
) -> Tensor:
    """The reference, in float64 but for the gradient."""
    if x_adv.numel() == 0:
        return torch.empty_like(x_adv)
    shape = (-1, *[1] * (x_adv.dim() - 1))

    def total(t: Tensor) -> Tensor:
        return t.reshape(len(t), -1).sum(1)

    g = finite_gradient(grad, x_adv.dtype)
    size = g.abs().reshape(len(g), -1)
    threshold = size.topk(count, 1).values[:, -1:].reshape(shape)
    chosen = (g.abs() >= threshold) & (g != 0)
    move = step_size / total(chosen).clamp_min(1).double()
    x0 = x0.double()
    delta = x_adv.double() - x0 + torch.where(chosen, move.reshape(shape), 0.0) * g.sign()
    room = torch.where(delta > 0, hi - x0, x0 - lo).clamp_min(0)
    length = torch.where(delta.isnan(), 0.0, delta.abs())

    def kept(tau: Tensor) -> Tensor:
        return torch.minimum((length - tau.reshape(shape)).clamp_min(0), room)

    low, high = torch.zeros_like(move), length.reshape(len(g), -1).amax(1)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        beyond = total(kept(middle).nan_to_num(0.0)) > eps
        low, high = torch.where(beyond, middle, low), torch.where(beyond, high, middle)
    inside = total(kept(torch.zeros_like(low)).nan_to_num(0.0)) <= eps
    x = x0 + delta.sign() * kept(torch.where(inside, 0.0, high))
    return torch.empty_like(x_adv).copy_(torch.where(delta.isnan(), delta, x.clamp(lo, hi)))


def _fake(
    x_adv: Tensor, grad: Tensor, x0: Tensor, step_size: float, eps: float, count: int, lo: float, hi: float
) -> Tensor:
    return torch.empty_like(x_adv)


IMPLEMENTATIONS = register(
    "pgd_step_l1",
    "(Tensor x_adv, Tensor grad, Tensor x0, float step_size, float eps, int count, float lo, float hi) -> Tensor",
    eager=_eager,
    fake=_fake,
    module="pgd_step_l1",
)


def pgd_step_l1(
    x_adv: Tensor,
    grad: Tensor,
    x0: Tensor,
    *,
    step_size: float,
    eps: float,
    sparsity: float = 0.99,
    lo: float = 0.0,
    hi: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Return the L1 step (SLIDE), projected on the intersection of ball and pixel range, out of place and
    detached.

    Per image the round((1 - sparsity) * d) entries (one at least) with the largest |grad|, and those equal to
    the last of them, move by the same amount along their signs, `step_size` together; entries with a gradient
    of 0 never do (Tramer & Boneh 2019, arXiv 1904.13000). The result is the point nearest to that, in L2,
    among those with ||z - x0||_1 <= eps and lo <= z <= hi: x0 + sign(d) * min(max(|d| - tau, 0), room), with
    tau = 0 or the multiplier at which the length is eps, found by bisection (Croce & Hein 2021, arXiv
    2103.01208). Clipping after a projection on the ball alone, as is often done, makes steps shorter than
    they may be. Kernels end at the smallest tau in the dtype of `x_adv` that does not leave the ball.

    Gradient entries that are NaN count as 0, infinite ones as the largest finite value (float64 images:
    1e150, and less than 1e-150 is 0). Where all are 0 the image makes no step. A NaN in `x_adv` or `x0` stays
    where it is and counts nothing. A negative `step_size` descends. `x0` is expected in [lo, hi]; the result
    is clipped in any case.

    Args:
        x_adv: the current points, (N, ...), float32 or float64, usually (N, C, H, W) in [lo, hi]. Its memory
            layout is the result's where each image is one block of memory (contiguous, channels-last), else
            the result is contiguous; grad and x0 are copied only where they are laid out differently.
        grad: gradient at `x_adv`, same shape, float32, float64, bfloat16 or float16.
        x0: the clean images, shape and dtype of `x_adv`.
        step_size: L1 length of the move, in units of the pixel range.
        eps: L1 radius around `x0`, >= 0, in the same unit.
        sparsity: share of entries that do not move, 0 <= sparsity < 1.
        lo, hi: the pixel range, lo <= hi.
        backend: "auto" or one of `fastdynat.ops.BACKENDS`.

    Raises:
        ValueError: shapes, dtypes, devices or bounds do not fit; UserError for an unknown backend.
        RuntimeError: the backend asked for cannot run here.
    """
    check_images("pgd_step_l1", x_adv)
    check_step("pgd_step_l1", x_adv, grad, x0, step_size, eps, lo, hi)
    if not 0 <= sparsity < 1:
        raise ValueError(
            f"pgd_step_l1: sparsity must be in [0, 1), the share of entries left alone, got {sparsity}"
        )
    count = max(1, round((1 - sparsity) * x_adv[:1].numel()))
    run = select("pgd_step_l1", IMPLEMENTATIONS, backend, x_adv)
    x_adv, grad, x0 = one_order(images_together(x_adv.detach()), grad.detach(), x0.detach())
    return run(x_adv, grad, x0, float(step_size), float(eps), count, float(lo), float(hi))
