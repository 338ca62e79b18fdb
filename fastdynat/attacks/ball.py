"""Distances between images, and the balls that attacks stay in."""

import torch
from torch import Tensor

ORDERS = {"linf": float("inf"), "l2": 2.0, "l1": 1.0}
# A perturbation may exceed eps by this share of it, besides the rounding of pixels near 1.
BEYOND = 1e-5


def distance(x_adv: Tensor, x: Tensor, norm: str) -> Tensor:
    """(N,) distance of each image; under l0 the number of pixels of which any channel changed."""
    if norm == "l0":
        return (x_adv != x).any(1).flatten(1).sum(1).to(x.dtype)
    return torch.linalg.vector_norm((x_adv - x).flatten(1), ORDERS[norm], dim=1)


def inside(x_adv: Tensor, x: Tensor, norm: str, eps: float) -> Tensor:
    """(N,) bool: `x_adv` is in [0, 1] and within `eps` of `x`, up to rounding; False for NaN."""
    in_range = ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)
    if norm == "l0":
        return (distance(x_adv, x, norm) <= eps) & in_range
    rounding = torch.finfo(x.dtype).eps
    moved = ((x_adv - x).abs() - rounding).clamp_min(0).flatten(1)
    return (torch.linalg.vector_norm(moved, ORDERS[norm], dim=1) <= eps * (1 + BEYOND)) & in_range
