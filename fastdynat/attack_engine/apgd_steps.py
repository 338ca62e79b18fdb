"""Starting points, steps and reviews of the step size of APGD in each norm; images are (N, C, H, W).

Croce & Hein 2020, arXiv 2003.01690; L1: Croce & Hein 2021, arXiv 2103.01208. Shared by the attack of
evaluations (`fastdynat.attacks.apgd`) and that of training (`adaptive_pgd`).
"""

import torch
from torch import Tensor

from fastdynat.attack_engine.lengths import length, per_image, unit_l2
from fastdynat.ops import Size, pgd_step_l1
from fastdynat.ops.image_draws import Randomness, normal_like, uniform_like

MOMENTUM = 0.75  # weight of the new step; the rest is the step before
STEP = {"linf": 2.0, "l2": 2.0, "l1": 1.0}  # the first step size in units of eps
RHO = 0.75  # share of steps between two reviews that must raise the loss, else the step size is halved
TINY = 1e-12


def checkpoints(steps: int, norm: str) -> dict[int, int]:
    """Steps (counted from 1) at which the step size is reviewed, each with the steps since the last."""
    if norm == "l1":
        back = max(int(0.04 * steps), 1)
        return dict.fromkeys(range(back, steps + 1, back), back)
    back, less, least = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    found, at = {}, back
    while at <= steps:
        found[at] = back
        back = max(back - less, least)
        at += back
    return found


def start(x: Tensor, norm: str, eps: float, generator: Randomness = None) -> Tensor:
    """A random point of the ball: on its surface for linf and l2, near it for l1; then clipped to [0, 1]."""
    if norm == "linf":
        u = 2 * uniform_like(x, generator, *x.shape[1:]) - 1
    else:
        u = normal_like(x, generator, *x.shape[1:])
    if norm == "l1":
        return project_on_l1_ball(x + u, x, eps)
    return torch.addcmul(x, u, per_image(eps / (length(u, norm) + TINY), x)).clamp_(0, 1)


def project_on_l1_ball(z: Tensor, x: Tensor, eps: Size) -> Tensor:
    """The point nearest to `z` in the L1 ball around `x` and in [0, 1]."""
    return pgd_step_l1(z, torch.zeros_like(z), x, step_size=eps, eps=eps)  # a gradient of zero makes no step


def project_l2(z: Tensor, x: Tensor, eps: Size) -> Tensor:
    """Shorten the move to `eps`, then clip to [0, 1]."""
    move = z - x
    # Moves are of the size of pixels, so that their squares need no care.
    size = torch.linalg.vector_norm(move, dim=tuple(range(1, move.dim())))
    share = ((size + TINY).reciprocal() * eps).clamp_max(1)  # as torch divides a number by a tensor
    return torch.addcmul(x, move, per_image(share, x)).clamp_(0, 1)


def move_linf(
    x_adv: Tensor, x_old: Tensor | None, grad: Tensor, size: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """A signed step of `size` (N,) clipped to [low, high], mixed with the last one (from `x_old`, if any)."""
    z = torch.addcmul(x_adv, grad.sign(), per_image(size, x_adv)).clamp_(low, high)
    return z if x_old is None else mixed(z, x_adv, x_old).clamp_(low, high)


def move_l2(x_adv: Tensor, x_old: Tensor | None, grad: Tensor, size: Tensor, x: Tensor, eps: Size) -> Tensor:
    """A step of length `size` (N,) along the gradient in the L2 ball around `x`, mixed with the last one."""
    z = project_l2(torch.addcmul(x_adv, unit_l2(grad), per_image(size, x)), x, eps)
    return z if x_old is None else project_l2(mixed(z, x_adv, x_old), x, eps)


def move_l1(x_adv: Tensor, grad: Tensor, size: Tensor, share: Tensor, x: Tensor, eps: Size) -> Tensor:
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


def moved(
    norm: str,
    x_adv: Tensor,
    x_old: Tensor | None,
    grad: Tensor,
    size: Tensor,
    share: Tensor,
    x: Tensor,
    low: Tensor,
    high: Tensor,
    eps: Size,
) -> Tensor:
    """The next point of APGD under `norm`.

    Args:
        share: (N,) of the entries that step, for l1.
        low, high: the bounds of the pixels, for linf.
    """
    if norm == "linf":
        return move_linf(x_adv, x_old, grad, size, low, high)
    if norm == "l2":
        return move_l2(x_adv, x_old, grad, size, x, eps)
    return move_l1(x_adv, grad, size, share, x, eps)


def stalls(
    rises: Tensor, back: int, reduced: Tensor, checked: Tensor, best: Tensor, rho: float = RHO
) -> Tensor:
    """(N,) bool: halve the step size and go back to the best point, for linf and l2.

    Args:
        rises: steps since the last review, `back` steps ago, that raised the loss.
        reduced, checked: whether the last review halved the step size, and the highest loss then.
        best: the highest loss now.
    """
    return (rises <= back * rho) | (~reduced & (checked >= best))


def l1_review(size: Tensor, now: Tensor, before: Tensor, full: Size) -> tuple[Tensor, Tensor]:
    """The step size of l1 (N,), and (N,) bool: go back to the best point.

    Full steps where the best point moves clearly fewer pixels (`now`) than at the last review (`before`);
    else smaller ones.
    """
    sparser = now / before < 0.95
    least, most = (torch.ones_like(size) * bound for bound in (full / 10, full))
    return torch.where(sparser, most, size / 1.5).clamp(least, most), sparser
