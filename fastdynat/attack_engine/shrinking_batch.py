"""Iterations over a shrinking batch: finished images leave it, so that no pass is spent on them."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

S = TypeVar("S")
# Number of times a batch may halve on devices where a new size is expensive: cuDNN searches its algorithms
# again, and cached memory is not reused.
HALVINGS = {"cuda": 4}
# Progress callback: gets the share of the work done, in [0, 1], several times a second to several times a
# minute; may raise to stop the work.
Tick = Callable[[float], None]


def no_tick(share: float) -> None:
    """A `Tick` that does nothing."""


def part(tick: Tick, k: int, of: int) -> Tick:
    """The `Tick` of part `k` of `of` equal parts of the work of `tick`."""
    return lambda share: tick((k + share) / of)


def allowed_halvings(compiled: int, x: Tensor) -> int:
    """The `max_halvings` of `iterate` for images `x` on their device.

    compiled: the limit of compiled code (`Ascent.max_halvings`); 0 where the code is not compiled.
    """
    return compiled or HALVINGS.get(x.device.type, 0)


def batch_sizes(most: int, halvings: int) -> list[int]:
    """Sizes of a batch of `most` images after 0, 1, ... `halvings` halvings, rounded up."""
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

    After every `every`-th step, finished images are looked for, which synchronises a GPU. They leave the
    batch once the unfinished share of it is at most `least`, and are put back, as they were, at the end. The
    result is that of running all images to the end, as long as the step treats images independently and does
    not change finished ones.

    Args:
        state: a dataclass; each tensor in it has a row per image, other fields are kept.
        done: state -> (N,) bool, images that need no further step.
        max_halvings: 0 lets the batch have any size; n >= 1 only the first size divided by 1, 2, 4, ..., 2^n
            (rounded up), filled up with finished images, so that code compiled or captured per shape is made
            at most n + 1 times.
        tick: gets the share of steps done.
    """
    whole = state
    rows = torch.arange(_batch_size(state), device=_first_tensor(state).device)
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
                whole = _put_back(whole, rows, state)
                # Unfinished images first, in order, then finished ones to fill the shape.
                chosen = (~unfinished).int().argsort(stable=True)[:size]
                rows, state = rows[chosen], _select(state, chosen)
        state = step(state, i)
    tick(1.0)
    return _put_back(whole, rows, state)


def _tensors(state: Any) -> dict[str, Tensor]:
    return {f.name: value for f in fields(state) if isinstance(value := getattr(state, f.name), Tensor)}


def _first_tensor(state: Any) -> Tensor:
    return next(iter(_tensors(state).values()))


def _batch_size(state: Any) -> int:
    return len(_first_tensor(state))


def _select(state: S, rows: Tensor) -> S:
    chosen = {name: t.index_select(0, rows) for name, t in _tensors(state).items()}
    return replace(state, **chosen)  # type: ignore[type-var]


def _put_back(whole: S, rows: Tensor, part: S) -> S:
    if len(rows) == _batch_size(whole):  # no image has left the batch
        return part
    old = _tensors(whole)
    merged = {name: old[name].index_copy(0, rows, t) for name, t in _tensors(part).items()}
    return replace(whole, **merged)  # type: ignore[type-var]


def replace_rows(into: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """`into` with images `rows` (N,) bool replaced by those of `values`; in place on the CPU."""
    if into.is_cuda:  # counting the rows would synchronise
        return torch.where(rows.view(-1, *[1] * (into.dim() - 1)), values, into)
    index = rows.nonzero().squeeze(1)
    return into.index_copy_(0, index, values.index_select(0, index)) if len(index) else into
