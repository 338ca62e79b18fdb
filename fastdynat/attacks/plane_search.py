"""Starting points, norms and moves of FAB (Croce & Hein 2020, arXiv 1907.02044) and its relatives."""

import torch
from torch import Tensor

from fastdynat.attack_engine.lengths import length, per_image
from fastdynat.ops import project_on_hyperplane, random_start
from fastdynat.ops.image_draws import Randomness, next_state

# The least length of a move in the weights of two moves, so that 0 / 0 does not occur.
LEAST_MOVE = 1e-8
DUAL = {"linf": "l1", "l2": "l2", "l1": "linf"}
NORMS = tuple(DUAL)


def start_away(x: Tensor, distance: float, norm: str = "linf", *, generator: Randomness = None) -> Tensor:
    """``clip(x + distance * u / ||u||)``: `distance` away from each image in a random direction.

    u is uniform in the cube under "linf" and Gaussian under "l2" and "l1".
    """
    state, images = next_state(generator, x.device)
    # A tenth of a Gaussian: well inside the range that random_start clips to.
    kind, scale = ("uniform", 1.0) if norm == "linf" else ("gaussian", 0.1)
    u = random_start(torch.zeros_like(x), state, images=images, kind=kind, scale=scale, lo=-1.0)
    return (x + distance * u / per_image(length(u, norm).clamp_min(LEAST_MOVE), x)).clamp(0, 1)


def move(
    z: Tensor,
    x: Tensor,
    w: Tensor,
    value: Tensor,
    at: Tensor,
    *,
    alpha_max: float,
    eta: float,
    norm: str = "linf",
) -> Tensor:
    """``clip((1 - a)(z + eta d1) + a (x + eta d2))``; d1 and d2 move the iterate z and image x to the plane.

    The plane is value + w . (p - at) = 0, in the box [0, 1]; a = min(||d1|| / (||d1|| + ||d2||), alpha_max),
    per image.

    Args:
        z, x, w, at: (N, ...), of one dtype; `w` is the gradient at `at` of the function that is `value` (N,)
            there.
    """
    from_z, from_x = (project(point, w, value, at, norm) for point in (z, x))
    d1, d2 = (
        length(on_plane - point, norm).clamp_min(LEAST_MOVE) for on_plane, point in ((from_z, z), (from_x, x))
    )
    a = (d1 / (d1 + d2)).clamp_max(alpha_max)
    return torch.lerp(torch.lerp(z, from_z, eta), torch.lerp(x, from_x, eta), per_image(a, x)).clamp(0, 1)


def project(x: Tensor, w: Tensor, value: Tensor, at: Tensor, norm: str = "linf") -> Tensor:
    """`project_on_hyperplane` in the box [0, 1], under "l1" as well (`project_on_hyperplane_l1`)."""
    return (
        project_on_hyperplane_l1(x, w, value, at)
        if norm == "l1"
        else project_on_hyperplane(x, w, value, at, norm=norm)
    )


def project_on_hyperplane_l1(x: Tensor, w: Tensor, value: Tensor, at: Tensor) -> Tensor:
    """The point z of [0, 1] with value + w . (z - at) = 0 at the smallest L1 distance from `x`, per image.

    Entries move to their bounds in order of |w|, largest first, until the plane is reached; the last one
    moves part of the way. Where the box ends before the plane, every entry with w != 0 is at its bound, as in
    `project_on_hyperplane`. An image whose plane is not finite, or whose w is 0, stays as it is. Sums are in
    float64.

    Args:
        x, w, at: (N, ...), of one dtype.
        value: (N,).
    """
    point, slope = x.flatten(1), w.flatten(1)
    gap = value.double() + (slope.double() * (point.double() - at.flatten(1).double())).sum(1)
    down = slope * gap.sign()[:, None].to(slope.dtype)  # a step against it closes the gap
    size, order = down.abs().sort(dim=1, descending=True)
    room = torch.where(down > 0, point, 1 - point).gather(1, order)
    gain = size.double() * room.double()
    taken = (gap.abs()[:, None] - (gain.cumsum(1) - gain)).clamp_min(0)
    # All but the last entry go all the way; a quotient of rounded numbers would fall short.
    step = torch.where(taken >= gain, room, torch.minimum((taken / size).to(room.dtype), room)) * (size > 0)
    usable = gap.isfinite()[:, None] & (gap != 0)[:, None] & slope.isfinite().all(1, keepdim=True)
    z = (point - torch.zeros_like(point).scatter(1, order, step) * down.sign()).clamp(0, 1)
    return torch.where(usable, z, point).view_as(x)
