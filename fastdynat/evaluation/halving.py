"""Smaller batches where memory does not suffice."""

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def with_halving(run: Callable[[int], T], batch_size: int, say: Callable[[str], None]) -> tuple[T, int]:
    """``run(batch_size)``, again with half of it as often as memory runs out, and the size that sufficed.

    Raises the error of a batch of one image that does not fit either.
    """
    while True:
        try:
            return run(batch_size), batch_size
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if batch_size == 1 or not out_of_memory(error):
                raise
        # Not in the handler: its traceback would keep the failed batch in memory.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        say(f"out of memory with {batch_size} images per batch; going on with {batch_size // 2}")
        batch_size //= 2


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says so, of the GPU or of the machine."""
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)
