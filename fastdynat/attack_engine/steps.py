"""Starting points and projected gradient steps per norm; images are (N, C, H, W) floats in [0, 1]."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdynat.errors import UserError, unknown_name
from fastdynat.ops import (
    AttackStep,
    Size,
    attack_step_l2,
    attack_step_linf,
    pgd_step_l0,
    pgd_step_l1,
    random_start,
)
from fastdynat.ops.image_draws import Randomness, next_state, uniform_like

GAUSSIAN_STD = 0.001  # TRADES' start, kept by LBGAT and DYNAT
STARTS = ("none", "uniform", "gaussian")
NO_ROOM = 1e-6  # a pixel this close to 0 or 1 counts as at the bound


def attack_step_l1(
    x_adv: Tensor,
    grad: Tensor,
    x0: Tensor,
    *,
    step_size: Size,
    eps: Size,
    low_dtype: torch.dtype | None = None,
) -> AttackStep:
    """`pgd_step_l1` on the 1 % of entries with the largest gradient, without pixels stuck at a bound.

    A pixel at 0 or 1 that the gradient drives outwards would take the place of one that can move; the
    authors' code (Tramer & Boneh 2019, arXiv 1904.13000) leaves it out too.
    """
    stuck = torch.where(grad > 0, x_adv > 1 - NO_ROOM, x_adv < NO_ROOM)
    x = pgd_step_l1(x_adv, grad.masked_fill(stuck, 0), x0, step_size=step_size, eps=eps)
    return _attack_step(x, grad, low_dtype)


def attack_step_l0(
    x_adv: Tensor,
    grad: Tensor,
    x0: Tensor,
    *,
    step_size: Size,
    eps: Size,
    low_dtype: torch.dtype | None = None,
) -> AttackStep:
    """`pgd_step_l0`, whose radius `eps` is a number of pixels; its sizes are never on the device."""
    if isinstance(step_size, Tensor) or isinstance(eps, Tensor):
        raise UserError("the step under l0 takes numbers, no tensors: its eps is a number of pixels")
    return _attack_step(pgd_step_l0(x_adv, grad, x0, step_size=step_size, pixels=int(eps)), grad, low_dtype)


def _attack_step(x: Tensor, grad: Tensor, low_dtype: torch.dtype | None) -> AttackStep:
    moved = grad.nan_to_num(0.0).abs().flatten(1).amax(1) > 0
    return AttackStep(x, None if low_dtype is None else x.to(low_dtype), moved)


STEPS = {"linf": attack_step_linf, "l2": attack_step_l2, "l1": attack_step_l1, "l0": attack_step_l0}
NORMS = tuple(STEPS)


def diameter(norm: str, shape: Sequence[int]) -> float:
    """The largest distance between two images of `shape` (C, H, W) under `norm`."""
    entries, pixels = torch.Size(shape).numel(), torch.Size(shape[1:]).numel()
    return {"linf": 1.0, "l2": entries**0.5, "l1": float(entries), "l0": float(pixels)}[norm]


def usual_step(norm: str, eps: float) -> float:
    """The default step size for radius `eps`: eps / 4; under L0, as an L1 length, 10 eps."""
    # The L0 step is spread over all entries of the image before all but eps pixels are reset.
    return 10 * eps if norm == "l0" else eps / 4


def start_point(x: Tensor, start: str, *, norm: str, eps: Size, generator: Randomness = None) -> Tensor:
    """Starting points of the attack.

    Args:
        start: "none": the image. "gaussian": image + 0.001 N(0, I), not projected on the ball (TRADES,
            DYNAT). "uniform": L-inf: uniform in the ball; L2 and L1: uniform direction, radius uniform in
            [0, eps]; not defined for L0.
        eps: the radius, a number or a float64 scalar on the device of `x`.
        generator: source of the noise.
    """
    if start == "none":
        return x.clone()
    if start not in STARTS:
        raise unknown_name("start", start, STARTS)
    state, images = next_state(generator, x.device)
    if start == "gaussian":
        # The published loops do not clip this start either; the first projected step does.
        return random_start(x, state, images=images, kind="gaussian", scale=GAUSSIAN_STD)
    if norm == "l1":
        radius = eps * uniform_like(x, generator, 1, 1, 1)
        return (x + radius * _l1_direction(x, state, images)).clamp(0, 1)
    return random_start(x, state, images=images, kind="uniform" if norm == "linf" else norm, scale=eps)


def _l1_direction(x: Tensor, state: Tensor, images: Tensor | None) -> Tensor:
    """Uniform on the L1 unit sphere, per image: independent Laplace variables over their L1 norm."""
    u = random_start(torch.zeros_like(x), state, images=images, kind="uniform", scale=1.0, lo=-1.0)
    laplace = -u.sign() * torch.log1p(-u.abs().clamp_max(1 - 2**-24))
    return laplace / laplace.abs().sum((1, 2, 3), keepdim=True).clamp_min(1e-20)


def pgd_step(
    x_adv: Tensor,
    grad: Tensor,
    x0: Tensor,
    *,
    norm: str,
    step_size: Size,
    eps: Size,
    low_dtype: torch.dtype | None = None,
) -> AttackStep:
    """One projected gradient ascent step under `norm`; returns new tensors, never in place.

    step_size, eps: numbers, or float64 scalars on the device of `x_adv`; under L0 numbers only.
    """
    if norm not in STEPS:
        raise unknown_name("norm", norm, NORMS)
    return STEPS[norm](x_adv, grad, x0, step_size=step_size, eps=eps, low_dtype=low_dtype)
