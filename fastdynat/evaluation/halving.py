"""Half the batch where memory does not suffice."""

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from fastdynat.errors import UserError, out_of_memory

logger = logging.getLogger(__name__)
T = TypeVar("T")


def with_halving(run: Callable[[int], T], batch_size: int) -> T:
    """``run(batch_size)``, from its beginning with half as many images as often as memory runs out.

    Whatever `run` draws, it draws anew: the result is the one of the smaller batch size, given from the
    start.

    Raises:
        UserError: not even one image at a time fits.
    """
    while True:
        try:
            return run(batch_size)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
        # Outside the except block: until its end the traceback keeps the tensors of the failed run alive.
        if batch_size == 1:
            raise UserError(
                f"memory does not suffice for one image at a time ({reason[:160]}); use another --device"
            )
        batch_size = (batch_size + 1) // 2
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.warning(
            "out of memory: started again with %d images per batch; with that batch size from the start, "
            "nothing is computed twice",
            batch_size,
        )
