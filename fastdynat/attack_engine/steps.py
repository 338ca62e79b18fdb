"""Starting points and steps of projected gradient ascent, per norm. Inputs (N, C, H, W) float in [0, 1]."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdynat.errors import unknown_name
from fastdynat.ops import AttackStep, attack_step_l2, attack_step_linf, pgd_step_l0, pgd_step_l1, random_start

GAUSSIAN_STD = 0.001  # TRADES' start, kept by LBGAT and DYNAT
STARTS = ("none", "uniform", "gaussian")
AT_THE_END = 1e-6  # a pixel that is no farther from 0 or 1 has no room left


def attack_step_l1(
    x_adv: Tensor,
    grad: Tensor,
    x0: Tensor,
    *,
    step_size: float,
    eps: float,
    low_dtype: torch.dtype | None = None,
) -> AttackStep:
    """`pgd_step_l1` on the 1 % of the entries with the largest gradient, of those that have room to follow
    it.

    A pixel at an end of the range that the gradient drives outwards would only take the place of one that can
    move; the authors' code (Tramer & Boneh 2019, arXiv 1904.13000) leaves it out as well.
    """
    stuck = torch.where(grad > 0, x_adv > 1 - AT_THE_END, x_adv < AT_THE_END)
    x = pgd_step_l1(x_adv, grad.masked_fill(stuck, 0), x0, step_size=step_size, eps=eps)
    return _told(x, grad, low_dtype)


def attack_step_l0(
    x_adv: Tensor,
    grad: Tensor,
    x0: Tensor,
    *,
    step_size: float,
    eps: float,
    low_dtype: torch.dtype | None = None,
) -> AttackStep:
    """`pgd_step_l0`, whose radius `eps` is a number of pixels."""
    return _told(pgd_step_l0(x_adv, grad, x0, step_size=step_size, pixels=int(eps)), grad, low_dtype)


def _told(x: Tensor, grad: Tensor, low_dtype: torch.dtype | None) -> AttackStep:
    moved = grad.nan_to_num(0.0).abs().flatten(1).amax(1) > 0
    return AttackStep(x, None if low_dtype is None else x.to(low_dtype), moved)


STEPS = {"linf": attack_step_linf, "l2": attack_step_l2, "l1": attack_step_l1, "l0": attack_step_l0}
NORMS = tuple(STEPS)


def diameter(norm: str, shape: Sequence[int]) -> float:
    """The largest distance between two images of `shape` (C, H, W)."""
    entries, pixels = torch.Size(shape).numel(), torch.Size(shape[1:]).numel()
    return {"linf": 1.0, "l2": entries**0.5, "l1": float(entries), "l0": float(pixels)}[norm]


def usual_step(norm: str, eps: float) -> float:
    """The step size that goes with a radius where none is named: eps / 4; under L0, an L1 length, 10 eps."""
    # The L0 step is shared by all entries of the image before all but eps pixels are reset.
    return 10 * eps if norm == "l0" else eps / 4


def start_point(
    x: Tensor, start: str, *, norm: str, eps: float, generator: torch.Generator | None = None
) -> Tensor:
    """Where the attack begins, inside [0, 1].

    "none": the image. "gaussian": image + 0.001 N(0, I), not projected on the ball (TRADES, DYNAT).
    "uniform": L-inf: uniform in the ball; L2 and L1: uniform direction, radius uniform in [0, eps]; L0 has
    none.
    """
    if start == "none":
        return x.clone()
    if start not in STARTS:
        raise unknown_name("start", start, STARTS)
    # The operator's generator is counter-based. Its key and counter come from torch's, on the device:
    # whatever seeds, saves or captures that one governs this one too.
    state = torch.randint(2**62, (2,), generator=generator, device=x.device)
    if start == "gaussian":
        # The published loops do not clip this start; the first projected step does.
        return random_start(x, state, kind="gaussian", scale=GAUSSIAN_STD)
    if norm == "l1":
        radius = eps * torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device, dtype=x.dtype)
        return (x + radius * _l1_direction(x, state)).clamp(0, 1)
    return random_start(x, state, kind="uniform" if norm == "linf" else norm, scale=eps)


def _l1_direction(x: Tensor, state: Tensor) -> Tensor:
    """Uniform on the unit sphere of L1, per image: independent Laplace variables over their length."""
    u = random_start(torch.zeros_like(x), state, kind="uniform", scale=1.0, lo=-1.0)
    laplace = -u.sign() * torch.log1p(-u.abs().clamp_max(1 - 2**-24))
    return laplace / laplace.abs().sum((1, 2, 3), keepdim=True).clamp_min(1e-20)


def pgd_step(
    x_adv: Tensor,
    grad: Tensor,
    x0: Tensor,
    *,
    norm: str,
    step_size: float,
    eps: float,
    low_dtype: torch.dtype | None = None,
) -> AttackStep:
    """One projected ascent step under `norm`; new tensors, never in place."""
    if norm not in STEPS:
        raise unknown_name("norm", norm, NORMS)
    return STEPS[norm](x_adv, grad, x0, step_size=step_size, eps=eps, low_dtype=low_dtype)
