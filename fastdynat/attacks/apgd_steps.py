"""Starting points and steps of APGD in each norm; images are (N, C, H, W).

Croce & Hein 2020; L1: Croce & Hein 2021, arXiv 2103.01208.
"""

import torch
from torch import Tensor

from fastdynat.attacks.plane_search import length, per_image, unit
from fastdynat.ops import pgd_step_l1
from fastdynat.ops.image_draws import Randomness, normal_like, uniform_like

MOMENTUM = 0.75  # weight of the new step; the rest is the step before
STEP = {"linf": 2.0, "l2": 2.0, "l1": 1.0}  # the first step size in units of eps
TINY = 1e-12


def start(x: Tensor, norm: str, eps: float, generator: Randomness = None) -> Tensor:
    """A random point of the ball: on its surface for linf and l2, near it for l1; then clipped to [0, 1]."""
    if norm == "linf":
        u = 2 * uniform_like(x, generator, *x.shape[1:]) - 1
    else:
        u = normal_like(x, generator, *x.shape[1:])
    if norm == "l1":
        return project_on_l1_ball(x + u, x, eps)
    return torch.addcmul(x, u, per_image(eps / (length(u, norm) + TINY), x)).clamp_(0, 1)


def project_on_l1_ball(z: Tensor, x: Tensor, eps: float) -> Tensor:
    """The point nearest to `z` in the L1 ball around `x` and in [0, 1]."""
    return pgd_step_l1(z, torch.zeros_like(z), x, step_size=eps, eps=eps)  # a gradient of zero makes no step


def project_l2(z: Tensor, x: Tensor, eps: float) -> Tensor:
    """Shorten the move to `eps`, then clip to [0, 1]."""
    move = z - x
    return torch.addcmul(x, move, per_image((eps / (length(move, "l2") + TINY)).clamp_max(1), x)).clamp_(0, 1)


def move_linf(
    x_adv: Tensor, x_old: Tensor | None, grad: Tensor, size: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """A signed step of `size` (N,) clipped to [low, high], mixed with the last one (from `x_old`, if any)."""
    z = torch.addcmul(x_adv, grad.sign(), per_image(size, x_adv)).clamp_(low, high)
    return z if x_old is None else mixed(z, x_adv, x_old).clamp_(low, high)


def move_l2(x_adv: Tensor, x_old: Tensor | None, grad: Tensor, size: Tensor, x: Tensor, eps: float) -> Tensor:
    """A step of length `size` (N,) along the gradient in the L2 ball around `x`, mixed with the last one."""
    z = project_l2(torch.addcmul(x_adv, unit(grad, "l2"), per_image(size, x)), x, eps)
    return z if x_old is None else project_l2(mixed(z, x_adv, x_old), x, eps)


def move_l1(x_adv: Tensor, grad: Tensor, size: Tensor, share: Tensor, x: Tensor, eps: float) -> Tensor:
    """A step of L1 length `size` (N,) on the `share` (N,) of pixels with the largest gradient."""
    pixels = grad[0].numel()
    rank = ((1 - share) * pixels).clamp(0, pixels - 1).long()
    least = grad.abs().flatten(1).sort(1).values.gather(1, rank[:, None]).squeeze(1)
    signs = torch.where(grad.abs() >= per_image(least, x), grad.sign(), 0)
    count = signs.abs().flatten(1).sum(1)
    return project_on_l1_ball(torch.addcmul(x_adv, signs, per_image(size / (count + 1e-10), x)), x, eps)


def mixed(z: Tensor, x_adv: Tensor, x_old: Tensor) -> Tensor:
    """``x_adv + m (z - x_adv) + (1 - m) (x_adv - x_old)`` in two passes."""
    return torch.lerp(x_old, x_adv, 2.0).lerp_(z, MOMENTUM)


def changed(x_adv: Tensor, x: Tensor) -> Tensor:
    """Number of changed pixel values of each image, (N,) int64."""
    return (x_adv != x).flatten(1).sum(1)
