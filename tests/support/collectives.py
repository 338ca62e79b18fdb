"""Counting the collectives that this process takes part in."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

NAMES = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce_scatter", "all_to_all")


@contextmanager
def counted_collectives() -> Iterator[list[tuple[str, int]]]:
    """Context that yields a list, to which each collective on tensors adds its name and its bytes."""
    calls: list[tuple[str, int]] = []
    originals = {name: getattr(dist, name) for name in NAMES}

    def counted(name: str):
        def call(tensor, *args, **kwargs):
            first = tensor[0] if isinstance(tensor, list) else tensor
            calls.append((name, first.nbytes))
            return originals[name](tensor, *args, **kwargs)

        return call

    try:
        for name in NAMES:
            setattr(dist, name, counted(name))
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
