"""The weight average of a run: what is validated and saved as the model."""

import copy

import torch
from torch import Tensor, nn


class WeightAverage:
    """An exponential moving average of `model`, moved once per step.

    The first `warmup` updates (at least one) copy the model; from then on ``average = d * average + (1 - d) * model``. Without
    a warm-up d is `decay`; after one it is ``min(decay, (1 + s) / (10 + s))``, s updates after its end (Gowal et al. 2020,
    DyART), so that an average that begins late soon forgets where it began. All of these numbers are the host's: nothing waits
    for the device.

    Attributes:
        module: the average, a network like `model`.
        updates: how often it was moved.
        warmup: updates before the average begins.
    """

    def __init__(self, model: nn.Module, decay: float, *, copy_buffers: bool = False) -> None:
        """`copy_buffers`: running statistics are always the model's own; else they are averaged like the weights."""
        self.module = copy.deepcopy(model)
        self.decay = decay
        self.warmup = self.updates = 0
        self._averaged: list[tuple[Tensor, Tensor]] = [*zip(self.module.parameters(), model.parameters(), strict=True)]
        self._copied: list[tuple[Tensor, Tensor]] = []
        for pair in zip(self.module.buffers(), model.buffers(), strict=True):
            (self._copied if copy_buffers or not pair[0].is_floating_point() else self._averaged).append(pair)

    def restart(self, *, warmup: int) -> None:
        """Forget the past: the next update copies the model."""
        self.warmup, self.updates = warmup, 0

    def keep_rate(self) -> float:
        """What the next update keeps of the average."""
        since = self.updates - self.warmup
        if since < 0 or self.updates == 0:
            return 0.0
        return min(self.decay, (1 + since) / (10 + since)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self) -> None:
        """Move the average by one step of the model."""
        _move(self._averaged, self.keep_rate())
        _move(self._copied, 0.0)
        self.updates += 1


def _move(pairs: list[tuple[Tensor, Tensor]], keep: float) -> None:
    """To `keep` of the first and the rest of the second tensor of each of `pairs`; exactly the second where `keep` is 0."""
    if not pairs:
        return
    average, model = ([*side] for side in zip(*pairs, strict=True))
    if keep == 0:
        torch._foreach_copy_(average, model)
    else:
        torch._foreach_lerp_(average, model, 1 - keep)
