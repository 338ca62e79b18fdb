"""Starting points and steps of projected gradient ascent, per norm. Inputs (N, C, H, W) float in [0, 1]."""

import torch
from torch import Tensor

from fastdynat.errors import unknown_name
from fastdynat.ops import AttackStep, attack_step_l2, attack_step_linf, random_start

GAUSSIAN_STD = 0.001  # TRADES' start, kept by LBGAT and DYNAT
STARTS = ("none", "uniform", "gaussian")
STEPS = {"linf": attack_step_linf, "l2": attack_step_l2}
NORMS = tuple(STEPS)


def start_point(x: Tensor, start: str, *, norm: str, eps: float, generator: torch.Generator | None = None) -> Tensor:
    """Where the attack begins, inside [0, 1].

    "none": the image. "gaussian": image + 0.001 N(0, I), not projected on the ball (TRADES, DYNAT).
    "uniform": L-inf: uniform in the ball; L2: uniform direction, radius uniform in [0, eps].
    """
    if start == "none":
        return x.clone()
    if start not in STARTS:
        raise unknown_name("start", start, STARTS)
    # The operator's generator is counter-based. Its key and counter come from torch's, on the device: whatever seeds,
    # saves or captures that one governs this one too.
    state = torch.randint(2**62, (2,), generator=generator, device=x.device)
    if start == "gaussian":
        # The published loops do not clip this start; the first projected step does.
        return random_start(x, state, kind="gaussian", scale=GAUSSIAN_STD)
    return random_start(x, state, kind="uniform" if norm == "linf" else norm, scale=eps)


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
