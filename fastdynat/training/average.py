"""Exponential moving average of the weights, which is validated and saved as the model."""

import copy

import torch
from torch import Tensor, nn

STATISTICS = ("running_mean", "running_var")  # of normalisation layers: always finite, so averaged unchecked


class WeightAverage:
    """An exponential moving average of `model`, moved once per step.

    The first `warmup` updates (at least one) copy the model; from then on ``average = d * average + (1 - d) *
    model``. Without a warm-up d is `decay`; after one it is ``min(decay, (1 + s) / (10 + s))``, s updates
    after its end (Gowal et al. 2020, DyART), so that an average that begins late soon forgets where it began.
    All of these numbers are on the host: no update waits for the device.

    Attributes:
        module: the average, a network like `model`.
        updates: updates so far.
        warmup: updates before the average begins.
    """

    def __init__(self, model: nn.Module, decay: float, *, copy_buffers: bool = False) -> None:
        """`copy_buffers`: copy running statistics from the model instead of averaging them."""
        self.module = copy.deepcopy(model)
        self.decay = decay
        self.warmup = self.updates = 0
        self._averaged: list[tuple[Tensor, Tensor]] = [
            *zip(self.module.parameters(), model.parameters(), strict=True)
        ]
        self._copied: list[tuple[Tensor, Tensor]] = []
        self._guarded: list[tuple[Tensor, Tensor]] = []
        for (name, buffer), other in zip(self.module.named_buffers(), model.buffers(), strict=True):
            if copy_buffers or not buffer.is_floating_point():
                kind = self._copied
            else:
                kind = self._averaged if name.endswith(STATISTICS) else self._guarded
            kind.append((buffer, other))

    def restart(self, *, warmup: int) -> None:
        """Forget the past: the next update copies the model."""
        self.warmup, self.updates = warmup, 0

    def keep_rate(self) -> float:
        """The share of the average that the next update keeps."""
        return keep_rate(self.decay, warmup=self.warmup, updates=self.updates)

    @torch.no_grad()
    def update(self) -> None:
        """Move the average by one step of the model."""
        keep = self.keep_rate()
        _move(self._averaged, keep)
        _move(self._copied, 0.0)
        for average, buffer in self._guarded:
            # Between infinite values, as in an attention mask, lerp gives NaN: they are copied.
            moved = average.lerp(buffer, 1 - keep) if keep else buffer
            average.copy_(torch.where(moved.isfinite(), moved, buffer))
        self.updates += 1


def keep_rate(decay: float, *, warmup: int, updates: int) -> float:
    """The share of an average that the update after `updates` others keeps; see `WeightAverage`."""
    since = updates - warmup
    if since < 0 or updates == 0:
        return 0.0
    return min(decay, (1 + since) / (10 + since)) if warmup else decay


def _move(pairs: list[tuple[Tensor, Tensor]], keep: float) -> None:
    """Set the first tensor of each pair to ``keep * first + (1 - keep) * second``; exactly second at 0."""
    if not pairs:
        return
    average, model = ([*side] for side in zip(*pairs, strict=True))
    if keep == 0:
        torch._foreach_copy_(average, model)
    else:
        torch._foreach_lerp_(average, model, 1 - keep)
