"""The L1 PGD step: ascend along the largest gradient entries, project onto ball and pixel range at once."""

import torch
from torch import Tensor

from fastdynat.ops._register import register_operator
from fastdynat.ops._size import Size, size_in
from fastdynat.ops._step import check_batch_dimension, check_step, empty_point, run_step, split_bounds
from fastdynat.ops.pgd_step_l2 import finite_gradient

OP = "pgd_step_l1"
HALVINGS = 64  # of the multiplier's interval: as many as float64 can tell apart


def _eager(
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
    """The reference, in float64 except for the gradient."""
    if x_adv.numel() == 0:
        return torch.empty_like(x_adv)
    step, radius = (
        size_in(torch.float64, step_size, device_step_size),
        size_in(torch.float64, eps, device_eps),
    )
    shape = (-1, *[1] * (x_adv.dim() - 1))

    def total(t: Tensor) -> Tensor:
        return t.reshape(len(t), -1).sum(1)

    g = finite_gradient(grad, x_adv.dtype)
    size = g.abs().reshape(len(g), -1)
    threshold = size.topk(count, 1).values[:, -1:].reshape(shape)
    chosen = (g.abs() >= threshold) & (g != 0)
    move = total(chosen).clamp_min(1).double().reciprocal() * step
    x0 = x0.double()
    delta = x_adv.double() - x0 + torch.where(chosen, move.reshape(shape), 0.0) * g.sign()
    room = torch.where(delta > 0, hi - x0, x0 - lo).clamp_min(0)
    length = torch.where(delta.isnan(), 0.0, delta.abs())

    def kept(tau: Tensor) -> Tensor:
        return torch.minimum((length - tau.reshape(shape)).clamp_min(0), room)

    low, high = torch.zeros_like(move), length.reshape(len(g), -1).amax(1)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        beyond = total(kept(middle).nan_to_num(0.0)) > radius
        low, high = torch.where(beyond, middle, low), torch.where(beyond, high, middle)
    inside = total(kept(torch.zeros_like(low)).nan_to_num(0.0)) <= radius
    x = x0 + delta.sign() * kept(torch.where(inside, 0.0, high))
    return torch.empty_like(x_adv).copy_(torch.where(delta.isnan(), delta, x.clamp(lo, hi)))


IMPLEMENTATIONS = register_operator(OP, eager=_eager, fake=empty_point)


def pgd_step_l1(
    x_adv: Tensor,
    grad: Tensor,
    x0: Tensor,
    *,
    step_size: Size,
    eps: Size,
    sparsity: float = 0.99,
    lo: float = 0.0,
    hi: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Return the L1 step (SLIDE), projected onto the intersection of ball and pixel range, as a new tensor.

    Per image, the round((1 - sparsity) * d) entries (at least one) with the largest |grad|, and all that tie
    with the last of them, move by the same amount along their signs; the moves sum to `step_size`. Entries
    with a gradient of 0 never move (Tramer & Boneh 2019, arXiv 1904.13000). The result is the L2-nearest
    point with ||z - x0||_1 <= eps and lo <= z <= hi: x0 + sign(d) * min(max(|d| - tau, 0), room), with tau =
    0 or the multiplier at which the L1 length is eps, by bisection (Croce & Hein 2021, arXiv 2103.01208). The
    common projection onto the ball alone, clipped afterwards, makes steps shorter than allowed. Kernels end
    at the smallest tau in the dtype of `x_adv` that stays in the ball. The result is detached.

    Gradient entries that are NaN count as 0, infinite ones as the largest finite value (float64 images:
    1e150, and less than 1e-150 is 0). Where all are 0 the image makes no step. A NaN in `x_adv` or `x0` stays
    and adds nothing to the length. A negative `step_size` descends. `x0` is expected in [lo, hi]; the result
    is clipped in any case.

    Args:
        x_adv: the current points, (N, ...), float32 or float64, usually (N, C, H, W) in [lo, hi]. Its memory
            layout is the result's where each image is one block of memory (contiguous, channels-last), else
            the result is contiguous; grad and x0 are copied only where they are laid out differently.
        grad: gradient at `x_adv`, same shape, float32, float64, bfloat16 or float16.
        x0: the clean images, shape and dtype of `x_adv`.
        step_size: L1 length of the move, in units of the pixel range; a number or a scalar
            tensor, as in `pgd_step_linf`.
        eps: L1 radius around `x0`, >= 0, in the same unit; a number or a scalar tensor.
        sparsity: fraction of entries that do not move, 0 <= sparsity < 1.
        lo, hi: the pixel range, lo <= hi.
        backend: "auto" or one of `fastdynat.ops.BACKENDS`.

    Raises:
        ValueError: shapes, dtypes, devices or bounds do not fit; UserError for an unknown backend.
        RuntimeError: the backend asked for cannot run here.
    """
    check_batch_dimension(OP, x_adv)
    check_step(OP, x_adv, grad, x0, step_size, eps, lo, hi)
    if not 0 <= sparsity < 1:
        raise ValueError(f"{OP}: sparsity must be in [0, 1), the share of entries left alone, got {sparsity}")
    count = max(1, round((1 - sparsity) * x_adv[:1].numel()))
    (step, radius, low, high), held = split_bounds(OP, (step_size, eps, lo, hi), x_adv)
    arguments = (step, radius, count, low, high, *held)
    return run_step(OP, IMPLEMENTATIONS, backend, (x_adv, grad, x0), arguments)
