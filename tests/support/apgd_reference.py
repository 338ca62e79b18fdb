"""APGD as Croce & Hein train with it, image after image in float64: written from the papers' formulas.

Croce & Hein 2020 (algorithm 1), 2021 (L1), 2022 and Singh et al. 2023 (the form of training). Shares no code
with the package.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Loss = Callable[[Tensor], Tensor]  # one point (C, H, W) -> scalar


def nearest_in_l1_ball(z: Tensor, x: Tensor, eps: float) -> Tensor:
    """The point of ``||p - x||_1 <= eps``, ``0 <= p <= 1`` nearest to `z`, by bisection of the multiplier."""
    d = z - x

    def shrunk(tau: float) -> Tensor:
        return (x + d.sign() * (d.abs() - tau).clamp_min(0)).clamp(0, 1)

    if float((shrunk(0.0) - x).abs().sum()) <= eps:
        return shrunk(0.0)
    low, high = 0.0, float(d.abs().max())
    for _ in range(200):
        middle = (low + high) / 2
        too_far = float((shrunk(middle) - x).abs().sum()) > eps
        low, high = (middle, high) if too_far else (low, middle)
    return shrunk(high)


def nearest_in_ball(z: Tensor, x: Tensor, eps: float, norm: str) -> Tensor:
    """The paper's projection: for l2, shortened to the radius and then clipped."""
    if norm == "linf":
        return torch.min(torch.max(z, x - eps), x + eps).clamp(0, 1)
    if norm == "l1":
        return nearest_in_l1_ball(z, x, eps)
    d = z - x
    return (x + d * min(1.0, eps / (float(d.norm()) + 1e-12))).clamp(0, 1)


def direction(gradient: Tensor, norm: str, share: Tensor) -> Tensor:
    """A step of length one: the sign, the unit vector, or equal steps on the largest `share` of entries.

    share: float32 as in the released code, whose rounding decides where a number of entries is whole.
    """
    if norm == "linf":
        return gradient.sign()
    if norm == "l2":
        return gradient / (gradient.norm() + 1e-12)
    entries = gradient.numel()
    ordered = gradient.abs().flatten().sort().values
    least = ordered[int(((1 - share) * entries).clamp(0, entries - 1))]
    chosen = gradient.sign() * (gradient.abs() >= least)
    return chosen / (chosen.abs().sum() + 1e-10)  # as in the released code, also above


def review_times(steps: int, norm: str) -> list[int]:
    """Numbers of the steps after which the step size is reviewed."""
    if norm == "l1":
        every = max(int(0.04 * steps), 1)
        return list(range(every, steps + 1, every))
    found, period = [max(int(0.22 * steps), 1)], max(int(0.22 * steps), 1)
    while True:
        period = max(period - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
        if found[-1] + period > steps:
            return found
        found.append(found[-1] + period)


def apgd_of_one_image(x: Tensor, loss: Loss, norm: str, eps: float, steps: int, start: Tensor) -> Tensor:
    """The point with the highest loss of the `steps` + 1 points that APGD visits from `start`."""

    def looked(z: Tensor) -> tuple[float, Tensor]:
        leaf = z.detach().requires_grad_()
        value = loss(leaf)
        return float(value.detach()), torch.autograd.grad(value, leaf)[0]

    points, losses, gradients = [start], [], []
    value, gradient = looked(start)
    losses.append(value)
    gradients.append(gradient)
    best, size, share, moved = 0, (1 if norm == "l1" else 2) * eps, torch.tensor(0.05), x.numel()
    z, before, g = start, start, gradient
    halved_last, best_at_last, last_review, times = True, value, 0, review_times(steps, norm)
    for n in range(1, steps + 1):
        new = nearest_in_ball(z + size * direction(g, norm, share), x, eps, norm)
        if n > 1 and norm != "l1":
            new = nearest_in_ball(z + 0.75 * (new - z) + 0.25 * (z - before), x, eps, norm)
        before, z = z, new
        value, g = looked(z)
        points.append(z)
        losses.append(value)
        gradients.append(g)
        if value > losses[best]:
            best = n
        if n not in times:
            continue
        if norm == "l1":
            now = int((points[best] != x).sum())
            back_to_best = moved > 0 and now / moved < 0.95
            size = eps if back_to_best else min(max(size / 1.5, eps / 10), eps)
            share, moved = torch.tensor(now) / x.numel() / 1.5, now
        else:
            # The first step is compared with 0 in the released code, which no cross-entropy is below.
            rises = sum(k == 1 or losses[k] > losses[k - 1] for k in range(last_review + 1, n + 1))
            back_to_best = rises <= 0.75 * (n - last_review)
            back_to_best |= not halved_last and best_at_last >= losses[best]
            size /= 2 if back_to_best else 1
            halved_last, best_at_last, last_review = back_to_best, losses[best], n
        if back_to_best:
            z, g = points[best], gradients[best]
    return points[best]


def apgd_reference(
    per_image: Callable[[Tensor, int], Tensor],
    x: Tensor,
    *,
    norm: str,
    eps: float,
    steps: int,
    start: Tensor | None = None,
) -> Tensor:
    """`apgd_of_one_image` for each image; `per_image` is the loss of a point (C, H, W) of image number i."""
    starts = (
        x
        if start is None
        else torch.stack([nearest_in_ball(z, one, eps, norm) for z, one in zip(start, x, strict=True)])
    )
    found = [
        apgd_of_one_image(x[i], lambda z, i=i: per_image(z, i), norm, eps, steps, starts[i])  # type: ignore[misc]
        for i in range(len(x))
    ]
    assert all(math.isfinite(float(z.sum())) for z in found)
    return torch.stack(found)
