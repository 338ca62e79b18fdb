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

    def __init__(self, remedy: str) -> None:
        """remedy: what to do about images that are normalised."""
        self._first, self._remedy = True, remedy
        self._pending: tuple[torch.cuda.Event, Tensor, int] | None = None

    def __call__(self, x: Tensor, labels: Tensor | None, classes: int) -> None:
        """x: (N, C, H, W) floats. labels: (N,) classes, or anything else that is not checked. classes: K."""
        if x.numel() == 0:
            return
        extremes = torch.stack([e.double() for part in (x, labels) if part is not None for e in torch.aminmax(part)])
        if x.device.type != "cuda" or self._first:
            self._first = False
            self._judge(extremes, classes)
            return
        if self._pending is not None and self._pending[0].query():
            _, earlier, its_classes = self._pending
            self._pending = None
            self._judge(earlier, its_classes, " (of an earlier call)")
        if self._pending is None:
            host = torch.empty(extremes.shape, dtype=extremes.dtype, pin_memory=True)
            host.copy_(extremes, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending = (event, host, classes)

    def _judge(self, extremes: Tensor, classes: int, which: str = "") -> None:
        low, high, *labels = extremes.tolist()
        if not (low >= -SLACK and high <= 1 + SLACK):  # NaN fails too
            raise UserError(f"images{which} must be in [0, 1], got [{low:g}, {high:g}]; divide by 255, or {self._remedy}")
        if labels and not (labels[0] >= 0 and labels[1] < classes):
            raise UserError(
                f"labels{which} must be in [0, {classes}), the model's classes, got {labels[0]:g} to {labels[1]:g}; "
                "number them from 0"
            )


def as_labels(labels: Tensor, x: Tensor) -> Tensor:
    """A copy of `labels` beside the images `x`: int64 classes (N,), or probabilities (N, K) in their dtype."""
    if labels.shape[:1] != x.shape[:1] or labels.dim() > 2:
        raise UserError(f"{len(x)} images but labels of shape {tuple(labels.shape)}; give one class per image")
    if labels.dim() == 1 and (labels.is_floating_point() or labels.dtype == torch.bool):
        raise UserError(f"labels must be classes, got {labels.dtype}; use labels.long()")
    return labels.detach().to(x.device, torch.int64 if labels.dim() == 1 else x.dtype, copy=True)


def check_targets(targets: Tensor, classes: int) -> None:
    """Raise UserError unless all that a user's function returned, int64 (N,), are classes. Waits for the device."""
    outside = targets[(targets < 0) | (targets >= classes)]
    if outside.numel():
        raise UserError(
            f"target_map_function returned class {int(outside[0])}, but the model's classes are 0 to {classes - 1}; "
            "return one of them for each image"
        )
