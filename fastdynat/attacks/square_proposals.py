"""Random draws and queries of the Square Attack, for many images and queries at once.

Andriushchenko et al. 2020 (arXiv 1912.00049), algorithms 2 and 3; under L1 as in the reference implementation
of AutoAttack.
"""

import bisect
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdynat.attack_engine.apgd_steps import project_on_l1_ball
from fastdynat.attack_engine.lengths import length, per_image
from fastdynat.ops.image_draws import ImageDraws, Randomness

# The share of the image that a square covers is halved after each of these queries, whatever their total.
HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
TILES = 5  # number of windows across and down in the start of L2 and L1
TINY = 1e-12  # keeps quotients of norms finite
INSIDE = 1 - 1e-6  # of the L1 radius, so that rounding stays in the ball
POWERS = {"l2": 2, "l1": 4}  # decay of a window


@dataclass(frozen=True)
class Draws:
    """All random draws of a search: Q queries, N images of C channels. Signs are int8, -1 or 1.

    Attributes:
        sides: (Q,) int64, of the squares.
        corners: (Q, 1, 2) int64, upper left (row, column); (Q, 2, 2) under L2 and L1, with the square that is
            emptied.
        signs: (Q, 1, C) under L-inf, shared by all images; (Q, N, C) under L2 and L1.
        turned: (Q,) bool: the window changes sign from left to right instead of from top to bottom.
        start: (N, C, 1, W) under L-inf, stripes; (T, N, C) under L2 and L1, of the T windows of the start.
        start_turned: (T,) bool.
    """

    sides: Tensor
    corners: Tensor
    signs: Tensor
    turned: Tensor
    start: Tensor
    start_turned: Tensor

    @classmethod
    def draw(
        cls, x: Tensor, norm: str, queries: int, p_init: float, *, generator: Randomness = None
    ) -> "Draws":
        """For images `x` (N, C, H, W). Squares are the same for all images, as in the authors' code."""
        (n, c, height, width), linf = x.shape, norm == "linf"

        def rand(*shape: int) -> Tensor:
            if isinstance(generator, ImageDraws):
                return generator.shared_uniform(*shape)
            return torch.rand(shape, generator=generator, device=x.device)

        def per_image(count: int) -> Tensor:
            """(count, N, C): channels of each image."""
            if isinstance(generator, ImageDraws):
                return generator.uniform(count, c).transpose(0, 1)
            return rand(count, n, c)

        def stripes() -> Tensor:
            return (
                generator.uniform(c, 1, width) if isinstance(generator, ImageDraws) else rand(n, c, 1, width)
            )

        def signs(uniform: Tensor) -> Tensor:
            return (2 * (uniform < 0.5).to(torch.int8) - 1).to(torch.int8).contiguous()

        sides = torch.tensor([side(k, p_init, height, width, linf) for k in range(queries)], device=x.device)
        room = torch.stack([height - sides, width - sides], 1)[:, None]
        tiles = len(_tiles(height, width))
        return cls(
            sides=sides,
            corners=(rand(queries, 1 if linf else 2, 2) * room).long(),
            signs=signs(rand(queries, 1, c) if linf else per_image(queries)),
            turned=rand(queries) < 0.5,
            start=signs(stripes() if linf else per_image(tiles)),
            start_turned=rand(tiles) < 0.5,
        )


def side(query: int, p_init: float, height: int, width: int, linf: bool) -> int:
    """Side of the squares of a query; odd and at least 3 under L2 and L1, if the image is as large."""
    p = p_init / 2 ** bisect.bisect_left(HALVED_AFTER, query)
    size = round(math.sqrt(p * height * width))
    return min(max(size, 1) if linf else max(size, 3) | 1, height, width)


@dataclass(frozen=True)
class Change:
    """The pixels that queries change of their images: a square of each.

    Attributes:
        pixels: (m, C, side, side), the new values.
        place: (m, C, side, side) int64, their places in the flat image (C * H * W).
        top, left: (m,) int64, the first row and column of the squares.
    """

    pixels: Tensor
    place: Tensor
    top: Tensor
    left: Tensor

    def take(self, rows: Tensor) -> "Change":
        return Change(self.pixels[rows], self.place[rows], self.top[rows], self.left[rows])


def paste(x: Tensor, change: Change) -> Tensor:
    """Images `x` (m, C, H, W) with the pixels of `change`."""
    return x.flatten(1).scatter(1, change.place.flatten(1), change.pixels.flatten(1)).view_as(x)


class Proposal(ABC):
    """The queries of a search under one norm: `draws` turned into images like `x` (N, C, H, W)."""

    def __init__(self, x: Tensor, eps: float, draws: Draws) -> None:
        self.x, self.eps, self.draws = x, eps, draws

    @abstractmethod
    def start(self) -> Tensor:
        """The starting points of the search, (N, C, H, W)."""

    @abstractmethod
    def query(self, best: Tensor, images: Tensor, queries: Tensor, first: int) -> Tensor:
        """The images of queries, (m, C, H, W).

        Args:
            best: (m, C, H, W), contiguous, the perturbed images to change.
            images, queries: (m,) their numbers; no query number is below `first`.
        """

    def _within(self, number: int, queries: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Row (m, H) and column (m, W) of each pixel in the square; negative, or >= the side, outside."""
        top, left = self.draws.corners[queries, number].unbind(1)
        return torch.arange(height, device=top.device) - top[:, None], torch.arange(
            width, device=top.device
        ) - left[:, None]

    def _mask(self, number: int, queries: Tensor, height: int, width: int) -> Tensor:
        """(m, 1, H, W) bool: the pixels of the square."""
        side = self.draws.sides[queries, None]
        rows, columns = ((at >= 0) & (at < side) for at in self._within(number, queries, height, width))
        return (rows[:, :, None] & columns[:, None, :])[:, None]


class Colours(Proposal):
    """L-inf: every pixel is at an end of its range; a query sets each channel of the square to one end."""

    def __init__(self, x: Tensor, eps: float, draws: Draws) -> None:
        super().__init__(x, eps, draws)
        self._ends = torch.stack([(x - eps).clamp(0, 1), (x + eps).clamp(0, 1)])
        self._sides: list[int] = draws.sides.tolist()
        self._line = torch.arange(max(x.shape[2:]), device=x.device)
        self._channels = torch.arange(x.shape[1], device=x.device)[:, None, None] * x[0, 0].numel()

    def start(self) -> Tensor:
        low, high = self._ends
        return torch.where(self.draws.start > 0, high, low)

    def query(self, best: Tensor, images: Tensor, queries: Tensor, first: int) -> Tensor:
        rows = torch.arange(len(best), device=best.device)
        return paste(best, self.change(best, rows, images, queries, first))

    def side(self, first: int) -> int:
        """Side of the squares that `change` returns; it never grows."""
        return self._sides[first]

    def change(self, best: Tensor, rows: Tensor, images: Tensor, queries: Tensor, first: int) -> Change:
        """The changes of the images `rows` (m,) of `best`; otherwise as `query`."""
        (height, width), size = best.shape[2:], self._sides[first]
        corner, side = self.draws.corners[queries, 0, :, None], self.draws.sides[queries, None, None]
        # Windows of one size, moved inside the image where a smaller square lies at its edge.
        top, left = corner[:, 0, 0].clamp_max(height - size), corner[:, 1, 0].clamp_max(width - size)
        at = torch.stack([top, left], 1)[:, :, None] + self._line[:size]
        inside = (at >= corner) & (at < corner + side)
        place = (at[:, 0, :, None] * width + at[:, 1, None, :])[:, None] + self._channels
        entries, upwards = best[0].numel(), (self.draws.signs[queries, 0] > 0)[:, :, None, None]
        end = self._ends.view(-1).take(((upwards * len(self.x)) + images.view(-1, 1, 1, 1)) * entries + place)
        within = (inside[:, 0, :, None] & inside[:, 1, None, :])[:, None]
        now = best.view(-1).take(rows.view(-1, 1, 1, 1) * entries + place)
        return Change(torch.where(within, end, now), place, top, left)


class Windows(Proposal):
    """L2 and L1: a query moves the perturbation of a second square into the first, and adds a window."""

    def __init__(self, norm: str, x: Tensor, eps: float, draws: Draws) -> None:
        super().__init__(x, eps, draws)
        self.norm = norm
        sizes, self._level = draws.sides.unique(return_inverse=True)
        largest = int(sizes[-1])
        bank = torch.zeros(2, len(sizes), largest, largest, dtype=torch.float64)
        for level, size in enumerate(sizes.tolist()):
            bank[0, level, :size, :size] = window(size, norm)
        bank[1] = bank[0].mT
        self._bank = bank.to(draws.sides.device)

    def start(self) -> Tensor:
        x, delta = self.x, torch.zeros_like(self.x)
        tiles = _tiles(*x.shape[2:])
        for (top, left, size), signs, turned in zip(
            tiles, self.draws.start, self.draws.start_turned.tolist(), strict=True
        ):
            shape = window(size, self.norm).to(x)
            delta[:, :, top : top + size, left : left + size] = signs[:, :, None, None] * (
                shape.mT if turned else shape
            )
        return self._onto(x, delta)

    def query(self, best: Tensor, images: Tensor, queries: Tensor, first: int) -> Tensor:
        x = self.x[images]
        delta, channels = best - x, x.shape[1]
        here, there = (self._mask(number, queries, *x.shape[2:]) for number in (0, 1))
        old = delta * here
        new = self._window(queries, x) * self.draws.signs[queries, images][:, :, None, None] + old / (
            TINY + self._size(old)
        )
        free, moved = self.eps - length(delta, self.norm), self._size(delta * (here | there))
        if self.norm == "l2":
            free = self.eps**2 - length(delta, "l2") ** 2
            budget = (per_image(free.clamp_min(0), x) / channels + moved**2).sqrt()
        else:
            budget = (per_image(free.clamp_min(0), x) / channels + moved) * channels
        new = new / (TINY + self._size(new)) * budget
        return self._onto(x, torch.where(here, new, delta * ~there))

    def _window(self, queries: Tensor, x: Tensor) -> Tensor:
        """The queries' windows in their squares, 0 elsewhere, (m, 1, H, W)."""
        rows, columns = self._within(0, queries, *x.shape[2:])
        last = self._bank.shape[-1] - 1
        turned, level = self.draws.turned[queries].long()[:, None, None], self._level[queries][:, None, None]
        values = self._bank.to(x.dtype)[
            turned, level, rows.clamp(0, last)[:, :, None], columns.clamp(0, last)[:, None, :]
        ]
        return values[:, None] * self._mask(0, queries, *x.shape[2:])

    def _size(self, delta: Tensor) -> Tensor:
        """The norm of each channel, (m, C, 1, 1)."""
        return length(delta.flatten(0, 1), self.norm).view(*delta.shape[:2], 1, 1)

    def _onto(self, x: Tensor, delta: Tensor) -> Tensor:
        """L2: `delta` scaled to norm eps, then clipped. L1: projection on ball and pixel range."""
        if self.norm == "l2":
            return (x + self.eps * delta / per_image(length(delta, "l2") + TINY, x)).clamp(0, 1)
        return project_on_l1_ball(x + delta, x, self.eps * INSIDE)


def proposal(norm: str, x: Tensor, eps: float, draws: Draws) -> Proposal:
    """The queries of `draws` on `x` under `norm`."""
    return Colours(x, eps, draws) if norm == "linf" else Windows(norm, x, eps, draws)


def window(size: int, norm: str) -> Tensor:
    """(size, size) float64 of norm 1: a bump in the upper half, a dent in the lower one."""
    halves = _bump(size // 2, size, norm), -_bump(size - size // 2, size, norm)
    whole = torch.cat(halves)
    return whole / length(whole[None], norm)


def _bump(height: int, width: int, norm: str) -> Tensor:
    """(height, width) float64 of norm 1: nested rectangles, the k-th of height 1 / (k + 1)^p."""
    rows = (torch.arange(height) - height // 2).abs()[:, None]
    columns = (torch.arange(width) - width // 2).abs()
    steps = 1 / (1 + torch.arange(max(height // 2, width // 2) + 1, dtype=torch.float64)) ** POWERS[norm]
    bump = steps.flip(0).cumsum(0).flip(0)[torch.maximum(rows, columns)]
    return bump / length(bump[None], norm) if height else bump


def _tiles(height: int, width: int) -> list[tuple[int, int, int]]:
    """(top, left, side) of the windows of the start."""
    size = max(height // TILES, 1)
    edge = max((height - size * TILES) // 2, 0)
    tops, lefts = (
        range(edge, min(edge + extent // size * size, extent - size + 1), size) for extent in (height, width)
    )
    return [(top, left, size) for top in tops for left in lefts]
