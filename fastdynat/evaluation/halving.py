"""Smaller batches when memory runs out."""

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from fastdynat.errors import UserError, out_of_memory

logger = logging.getLogger(__name__)
T = TypeVar("T")


def with_halving(run: Callable[[int], T], batch_size: int) -> T:
    """``run(batch_size)``, started again with half the batch size each time memory runs out.

    `run` must draw its random numbers anew; the result is that of the smaller batch size.

    Raises:
        UserError: not even one image fits.
    """
    while True:
        try:
            return run(batch_size)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
        # Outside the except block, whose traceback keeps the tensors of the failed run alive.
        if batch_size == 1:
            raise UserError(
                f"there is not enough memory for one image at a time ({reason[:160]}); use another --device"
            )
        batch_size = (batch_size + 1) // 2
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.warning(
            "out of memory: restarted with %d images per batch; give that batch size from the start "
            "(--batch-size; in training --eval-batch-size) to avoid computing anything twice",
            batch_size,
        )
