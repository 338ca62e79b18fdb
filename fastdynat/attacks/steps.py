"""Starting points and steps of projected gradient ascent, per norm. Inputs (N, C, H, W) float in [0, 1]."""

import torch
from torch import Tensor

from fastdynat.errors import unknown_name
from fastdynat.ops import pgd_step_linf

GAUSSIAN_STD = 0.001  # TRADES' start, kept by LBGAT and DYNAT
STARTS = ("none", "uniform", "gaussian")
NORMS = ("linf", "l2")
TINY = 1e-10  # keeps an all-zero gradient from dividing 0 by 0


def _image_norm(t: Tensor) -> Tensor:
    """Euclidean norm per image, shaped (N, 1, 1, 1)."""
    return t.flatten(1).norm(dim=1).reshape(-1, *[1] * (t.dim() - 1))


def start_point(x: Tensor, start: str, *, norm: str, eps: float, generator: torch.Generator | None = None) -> Tensor:
    """Where the attack begins, inside [0, 1].

    "none": the image. "gaussian": image + 0.001 N(0, I), not projected on the ball (TRADES, DYNAT).
    "uniform": L-inf: uniform in the ball; L2: uniform direction, radius uniform in [0, eps].
    """
    if start == "none":
        return x.clone()
    if start == "gaussian":
        # The published loops do not clip this start; the first projected step does.
        return x + GAUSSIAN_STD * torch.empty_like(x).normal_(generator=generator)
    if start != "uniform":
        raise unknown_name("start", start, STARTS)
    if norm == "linf":
        return (x + torch.empty_like(x).uniform_(-eps, eps, generator=generator)).clamp_(0, 1)
    direction = torch.empty_like(x).normal_(generator=generator)
    length = _image_norm(direction)
    radius = torch.zeros_like(length).uniform_(0, 1, generator=generator)
    return (x + direction * (radius / length * eps)).clamp_(0, 1)


def pgd_step_l2(x_adv: Tensor, grad: Tensor, x0: Tensor, *, step_size: float, eps: float) -> Tensor:
    """One normalised gradient step, projected on the L2 ball and the image range. Returns a new tensor."""
    # As under L-inf a NaN moves nothing. Dividing by the largest entry first keeps the squares of tiny gradients from
    # underflowing and those of huge ones from overflowing; an all-zero gradient is divided by 1: the image stays put.
    grad = torch.nan_to_num(grad.to(x_adv.dtype), nan=0.0)
    largest = grad.abs().amax(dim=(1, 2, 3), keepdim=True)
    grad = grad / torch.where(largest > 0, largest, 1.0)
    moved = x_adv + step_size * grad / _image_norm(grad).clamp_min(1.0)
    delta = moved - x0
    delta = delta * (eps / (_image_norm(delta) + TINY)).clamp_max(1.0)
    return (x0 + delta).clamp(0, 1)


def pgd_step(x_adv: Tensor, grad: Tensor, x0: Tensor, *, norm: str, step_size: float, eps: float) -> Tensor:
    """One projected ascent step under `norm`; a new tensor, never in place."""
    if norm == "linf":
        return pgd_step_linf(x_adv, grad, x0, step_size=step_size, eps=eps)
    if norm == "l2":
        return pgd_step_l2(x_adv, grad, x0, step_size=step_size, eps=eps)
    raise unknown_name("norm", norm, NORMS)
