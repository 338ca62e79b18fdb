"""The numerical check of every export: what was written is read again and must give the network's logits."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastdynat.errors import UserError

BATCHES = (1, 5)  # 1 is the size that exporters like to freeze
TOLERANCE = 1e-4  # of the largest logit


@torch.no_grad()
def largest_difference(
    model: nn.Module, exported: Callable[[Tensor], Tensor], shape: tuple[int, int, int]
) -> float:
    """The largest |difference| between the logits of `model` and `exported` on uniform images in [0, 1].

    Raises: UserError where it is more than 1e-4 of the largest |logit|, or not a number.
    """
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for count in BATCHES:
        x = torch.rand(count, *shape, generator=generator)
        logits, others = model(x), exported(x)
        difference, scale = float((logits - others).abs().max()), float(logits.abs().max())
        # Not `>`: that is false for nan.
        if not difference <= TOLERANCE * scale:
            raise UserError(
                f"the exported network's logits differ from the run's by {difference:.1e} (largest logit "
                f"{scale:.1e}, batch of "
                f"{count}); nothing was written; try another --format"
            )
        worst = max(worst, difference)
    return worst
