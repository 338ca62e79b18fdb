"""Checks of what a call was given that never make the host wait for a GPU."""

import torch
from torch import Tensor

from fastdynat.errors import UserError

# Undoing a normalisation rounds, half precision too; pixels that were never scaled to [0, 1] are far beyond.
SLACK = 0.01


class RangeCheck:
    """Refuses images outside [0, 1] and labels outside [0, K).

    On the CPU at once. On a GPU the first batch is waited for; of later ones the extremes are copied to the host beside the
    attack, and looked at by the next call that finds them there: the error then comes a call late, but no call waits.
    """

    def __init__(self) -> None:
        self._first = True
        self._pending: tuple[torch.cuda.Event, Tensor, int] | None = None

    def __call__(self, x: Tensor, labels: Tensor | None, classes: int) -> None:
        """x: (N, C, H, W) floats. labels: (N,) classes, or anything else that is not checked. classes: K."""
        if x.numel() == 0:
            return
        extremes = torch.stack([e.double() for part in (x, labels) if part is not None for e in torch.aminmax(part)])
        if x.device.type != "cuda" or self._first:
            self._first = False
            _judge(extremes, classes)
            return
        if self._pending is not None and self._pending[0].query():
            _, earlier, its_classes = self._pending
            self._pending = None
            _judge(earlier, its_classes, " (of an earlier call)")
        if self._pending is None:
            host = torch.empty(extremes.shape, dtype=extremes.dtype, pin_memory=True)
            host.copy_(extremes, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending = (event, host, classes)


def _judge(extremes: Tensor, classes: int, which: str = "") -> None:
    low, high, *labels = extremes.tolist()
    if not (low >= -SLACK and high <= 1 + SLACK):  # NaN fails too
        raise UserError(
            f"images{which} must be in [0, 1], got [{low:g}, {high:g}]; divide by 255, or tell the attack how they are "
            "normalised: set_normalization_used(mean, std)"
        )
    if labels and not (labels[0] >= 0 and labels[1] < classes):
        raise UserError(
            f"labels{which} must be in [0, {classes}), the model's classes, got {labels[0]:g} to {labels[1]:g}; "
            "number them from 0"
        )
