"""The L-inf PGD step: ascend along the gradient's sign, project onto the ball, clip to the pixel range."""

import torch
from torch import Tensor

from fastdynat.ops._layout import images_together, one_order
from fastdynat.ops._register import register
from fastdynat.ops._select import select
from fastdynat.ops._step import AttackStep, check_low, check_step, empty_step


def _eager(
    x_adv: Tensor,
    grad: Tensor,
    x0: Tensor,
    step_size: float,
    eps: float,
    lo: float,
    hi: float,
    low_dtype: torch.dtype | None = None,
    count: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The reference: what every other implementation equals bit by bit."""
    # torch.sign says nothing about NaN; comparisons with NaN are false, so that pixel does not move.
    up, down = grad > 0, grad < 0
    x = x_adv + step_size * (up.to(x_adv.dtype) - down.to(x_adv.dtype))
    x = torch.clamp(x, x0 - eps, x0 + eps)
    x = torch.clamp(x, lo, hi)
    low = x.to(low_dtype) if low_dtype is not None else x.new_empty(0)
    if not count:
        return x, low, x.new_empty(0, dtype=torch.bool)
    moved = (up | down).reshape(grad.shape[0], grad[:1].numel())
    return x, low, moved.any(1)


def _fake(
    x_adv: Tensor,
    grad: Tensor,
    x0: Tensor,
    step_size: float,
    eps: float,
    lo: float,
    hi: float,
    low_dtype: torch.dtype | None = None,
    count: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_step(x_adv, low_dtype, count)


IMPLEMENTATIONS = register(
    "pgd_step_linf",
    "(Tensor x_adv, Tensor grad, Tensor x0, float step_size, float eps, float lo, float hi, "
    "ScalarType? low_dtype=None, bool count=False) -> (Tensor x, Tensor low, Tensor moved)",
    eager=_eager,
    fake=_fake,
    module="pgd_step_linf",
)


def pgd_step_linf(
    x_adv: Tensor,
    grad: Tensor,
    x0: Tensor,
    *,
    step_size: float,
    eps: float,
    lo: float = 0.0,
    hi: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Return clamp(clamp(x_adv + step_size * sign(grad), x0 - eps, x0 + eps), lo, hi), out of place and
    detached.

    Bitwise the same in every backend. sign(0) = 0; where `grad` is NaN the pixel does not move. NaN in
    `x_adv` or `x0` gives NaN. A negative `step_size` descends. Madry et al. 2018 (arXiv 1706.06083), section
    2.1.

    Args:
        x_adv: the current point, any shape, float32 or float64, usually (N, C, H, W) in [lo, hi]. Its memory
            layout is the result's; grad and x0 are copied only where they are laid out differently.
        grad: gradient at `x_adv`, same shape, float32, float64, bfloat16 or float16.
        x0: the clean images, shape and dtype of `x_adv`.
        step_size: move per pixel, in units of the pixel range.
        eps: L-inf radius around `x0`, >= 0, in the same unit.
        lo, hi: the pixel range, lo <= hi.
        backend: "auto" or one of `fastdynat.ops.BACKENDS`.

    Raises:
        ValueError: shapes, dtypes, devices or bounds do not fit; UserError for an unknown backend.
        RuntimeError: the backend asked for cannot run here.
    """
    x, _, _ = _run(x_adv, grad, x0, step_size, eps, lo, hi, None, False, backend)
    return x


def attack_step_linf(
    x_adv: Tensor,
    grad: Tensor,
    x0: Tensor,
    *,
    step_size: float,
    eps: float,
    lo: float = 0.0,
    hi: float = 1.0,
    low_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> AttackStep:
    """`pgd_step_linf`, and from the same pass over memory what an attack loop would read the tensors again
    for.

    Args:
        x_adv, grad, x0, step_size, eps, lo, hi, backend: as in `pgd_step_linf`; the first dimension is the
            image.
        low_dtype: also return the new point in bfloat16 or float16, for a network that reads it so.

    Raises: as `pgd_step_linf`.
    """
    if x_adv.dim() == 0:
        raise ValueError("attack_step_linf: x_adv needs a first dimension of images, got a scalar")
    x, low, moved = _run(images_together(x_adv), grad, x0, step_size, eps, lo, hi, low_dtype, True, backend)
    return AttackStep(x, low if low_dtype is not None else None, moved)


def _run(
    x_adv: Tensor,
    grad: Tensor,
    x0: Tensor,
    step_size: float,
    eps: float,
    lo: float,
    hi: float,
    low_dtype: torch.dtype | None,
    count: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    check_step("pgd_step_linf", x_adv, grad, x0, step_size, eps, lo, hi)
    check_low("pgd_step_linf", low_dtype)
    run = select("pgd_step_linf", IMPLEMENTATIONS, backend, x_adv)
    x_adv, grad, x0 = one_order(x_adv.detach(), grad.detach(), x0.detach())
    return run(x_adv, grad, x0, float(step_size), float(eps), float(lo), float(hi), low_dtype, count)
