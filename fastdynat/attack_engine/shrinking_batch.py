"""Iterations over a batch that shrinks: images that are finished are taken out of it, so that no pass is
spent on them.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

S = TypeVar("S")
# How often a batch may halve on devices where each size costs: cuDNN looks for its algorithms, and memory is
# not used again.
HALVINGS = {"cuda": 4}
# Told the share of the work that is done, in [0, 1], several times a second to several times a minute; may
# raise to stop it.
Tick = Callable[[float], None]


def no_tick(share: float) -> None:
    """A `Tick` that nobody listens to."""


def part(tick: Tick, k: int, of: int) -> Tick:
    """The `Tick` of the k-th of `of` parts of equal size."""
    return lambda share: tick((k + share) / of)


def allowed_halvings(compiled: int, x: Tensor) -> int:
    """The `max_halvings` of `iterate` for images `x` on their device; `compiled` is that of compiled code, 0 where
    there is none.
    """
    return compiled or HALVINGS.get(x.device.type, 0)


def batch_sizes(most: int, halvings: int) -> list[int]:
    """The sizes that a batch of at most `most` images has then: `most` divided by 1, 2, 4, ..., rounded
    up.
    """
    return [-(-most // 2**k) for k in range(halvings + 1)]


def iterate(
    state: S,
    step: Callable[[S, int], S],
    steps: int,
    *,
    done: Callable[[S], Tensor],
    every: int = 10,
    least: float = 0.9,
    max_halvings: int = 0,
    tick: Tick = no_tick,
) -> S:
    """``state = step(state, i)`` for i in 0 .. steps - 1, on the images that are not done.

    Finished images are looked for after every `every`-th step, which on a GPU waits for it, and leave the
    batch when at most the share `least` of it is unfinished; they come back, as they were then, at the end.
    The result is that of running all images to the end as long as the step treats each image by itself and
    leaves finished ones as they are.

    Args:
        state: a dataclass; every tensor in it has a row per image, anything else in it is kept.
        done: the state -> (N,) bool, images that need no further step.
        max_halvings: 0 lets the batch have any size; n >= 1 only the first size divided by 1, 2, 4, ..., 2^n
            (rounded up), filled up with finished images, so that code compiled or captured per shape is made
            at most n + 1 times.
        tick: told the share of steps done.
    """
    whole, rows = state, torch.arange(_images(state), device=_some(state).device)
    sizes = batch_sizes(len(rows), max_halvings)
    for i in range(steps):
        tick(i / steps)
        if i % every == 0:
            unfinished = ~done(state)
            count = int(unfinished.sum())
            if count == 0:
                break
            size = min(size for size in sizes if size >= count) if max_halvings else count
            if size < len(unfinished) and count <= least * len(unfinished):
                whole = _put(whole, rows, state)
                # Unfinished ones first, in their order; then as many finished ones as fill the shape.
                chosen = (~unfinished).int().argsort(stable=True)[:size]
                rows, state = rows[chosen], _take(state, chosen)
        state = step(state, i)
    tick(1.0)
    return _put(whole, rows, state)


def _tensors(state: Any) -> dict[str, Tensor]:
    return {f.name: value for f in fields(state) if isinstance(value := getattr(state, f.name), Tensor)}


def _some(state: Any) -> Tensor:
    return next(iter(_tensors(state).values()))


def _images(state: Any) -> int:
    return len(_some(state))


def _take(state: S, rows: Tensor) -> S:
    return replace(state, **{name: t.index_select(0, rows) for name, t in _tensors(state).items()})  # type: ignore[type-var]


def _put(whole: S, rows: Tensor, part: S) -> S:
    if len(rows) == _images(whole):  # nothing was ever taken out
        return part
    old = _tensors(whole)
    return replace(whole, **{name: old[name].index_copy(0, rows, t) for name, t in _tensors(part).items()})  # type: ignore[type-var]


def replace_rows(into: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """`into` with the images `rows` (N,) bool replaced by those of `values`; on the CPU in place, touching no
    other image.
    """
    if into.is_cuda:  # whose count of rows would have to be waited for
        return torch.where(rows.view(-1, *[1] * (into.dim() - 1)), values, into)
    index = rows.nonzero().squeeze(1)
    return into.index_copy_(0, index, values.index_select(0, index)) if len(index) else into
