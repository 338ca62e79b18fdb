"""The published boundary search and quality filter (algorithms B.4), in loops, independent of our code."""

import math

import torch
from torch import Tensor, nn

from fastdynat.attacks.boundary_search import BoundarySpec


def phi(net: nn.Module, x: Tensor, label: int, temperature: float) -> Tensor:
    """z_y - (1/T) log sum_{k != y} exp(T z_k) of one image, as it is written."""
    z = net(x[None])[0]
    return (
        z[label]
        - torch.log(sum(torch.exp(temperature * z[k]) for k in range(len(z)) if k != label)) / temperature
    )


def sorted_projection(point: Tensor, w: Tensor, offset: Tensor) -> Tensor:
    """Displacement to the plane w . z = offset in [0, 1], one flat image: sort, cumulate, bisect."""
    gap = float(w @ point - offset)
    towards = -math.copysign(1.0, gap) * w.sign()
    room = torch.where(towards > 0, 1 - point, point) * (w != 0)
    order = torch.argsort(room)
    rooms, sizes = room[order], w.abs()[order]
    spent = torch.cat([torch.zeros(1, dtype=w.dtype), torch.cumsum(sizes * rooms, 0)])
    left = torch.cat([sizes.sum()[None], sizes.sum() - torch.cumsum(sizes, 0)])

    def reached(i: int) -> float:  # where the i-th nearest pixel meets its bound
        return float(spent[i] + left[i] * (rooms[i - 1] if i else 0.0))

    low, high = 0, len(w)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if reached(middle) <= abs(gap) else (low, middle - 1)
    budget = (abs(gap) - spent[low]) / left[low] if left[low] > 1e-14 else torch.tensor(1.0)
    return towards * torch.minimum(budget.clamp(0, 1).expand_as(room), room)


def published_search(
    net: nn.Module, x: Tensor, y: int, start: Tensor, spec: BoundarySpec
) -> tuple[Tensor, float | None]:
    """algorithms B.4, one image: the nearest point (the image where none was found) and its distance."""
    if phi(net, x, y, spec.temperature) <= 1e-9:
        return x, None
    best, distance, z = x, None, start
    for _ in range(spec.steps):
        z = z.detach().requires_grad_()
        value = phi(net, z, y, spec.temperature)
        w = torch.autograd.grad(value, z)[0].flatten()
        z, value = z.detach(), value.detach()
        offset = w @ z.flatten() - value
        d1 = sorted_projection(z.flatten(), w, offset).view_as(x)
        d2 = sorted_projection(x.flatten(), w, offset).view_as(x)
        first, second = (max(float(d.abs().max()), 1e-8) for d in (d1, d2))
        a = min(first / (first + second), spec.alpha_max)
        z = torch.clamp((1 - a) * (z + spec.eta * d1) + a * (x + spec.eta * d2), 0, 1)
        if phi(net, z, y, spec.temperature) < 0:
            away = float((z - x).abs().max())
            if distance is None or away < distance:
                best, distance = z, away
            z = x + spec.beta_back * (z - x)
    return best, distance


def published_filter(net: nn.Module, x: Tensor, y: int, point: Tensor, temperature: float) -> bool:
    """True if the found point passes the filter.

    It is not deep, nine tenths of the pixels that moved farthest moved downhill, and the share of flat ones
    among the others, which is not a number where there are no others, is above 0.
    """
    leaf = point.detach().requires_grad_()
    value = phi(net, leaf, y, temperature)
    slope = torch.autograd.grad(value, leaf)[0].flatten().tolist()
    moved = (point - x).flatten().tolist()
    longest = max(abs(m) for m in moved)
    far = [(m, s) for m, s in zip(moved, slope, strict=True) if abs(m) / longest > 0.8]
    downhill = sum(m * s < -1e-7 for m, s in far)
    others = len(moved) - len(far)
    steep = sum(abs(m) / longest <= 0.8 and abs(s) > 0.1 for m, s in zip(moved, slope, strict=True))
    flat = (others - steep) / others if others else math.nan
    return float(value.detach()) > -0.3 and downhill / len(far) > 0.9 and flat > 0
