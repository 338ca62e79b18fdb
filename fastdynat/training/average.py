"""Average of the weights, which is validated and saved as the model: exponential, or with equal weights."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

STATISTICS = ("running_mean", "running_var")  # of normalisation layers: always finite, so averaged unchecked


@dataclass(frozen=True)
class AverageRule:
    """The shares of an average.

    The updates before it begins copy the model, as its first one does; from then on ``average = k * average +
    (1 - k) * model``.

    Attributes:
        decay: k of an exponential average.
        equal: all weights since the beginning count alike, whatever `decay`: k is n / (n + 1) after n.
        warmup: updates before an average that begins with a ramp: s updates after them k is ``min(decay, (1 +
            s) / (10 + s))`` (Gowal et al. 2020, DyART), so that it soon forgets where it began.
        start: updates before an average without a ramp.
    """

    decay: float
    equal: bool = False
    warmup: int = 0
    start: int = 0

    def keep_rate(self, updates: int) -> float:
        """The share that the update after `updates` others keeps."""
        if self.warmup:
            since = updates - self.warmup
            return 0.0 if since < 0 else min(self.decay, (1 + since) / (10 + since))
        since = updates - self.start
        if since <= 0:
            return 0.0
        return since / (since + 1) if self.equal else self.decay


class WeightAverage:
    """An average of `model`, by an `AverageRule`.

    All of its numbers are on the host: no update waits for the device.

    Attributes:
        module: the average, a network like `model`.
        updates: updates so far.
        rule: which share each of them keeps.
    """

    def __init__(self, model: nn.Module, rule: AverageRule, *, copy_buffers: bool = False) -> None:
        """`copy_buffers`: copy running statistics from the model instead of averaging them."""
        self.module = copy.deepcopy(model)
        self.rule, self.updates = rule, 0
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

    def restart(self, rule: AverageRule) -> None:
        """Forget the past: the next update copies the model."""
        self.rule, self.updates = rule, 0

    def keep_rate(self) -> float:
        """The share of the average that the next update keeps."""
        return self.rule.keep_rate(self.updates)

    @torch.no_grad()
    def update(self) -> None:
        """Move the average to the present weights of the model."""
        keep = self.keep_rate()
        _move(self._averaged, keep)
        _move(self._copied, 0.0)
        for average, buffer in self._guarded:
            # Between infinite values, as in an attention mask, lerp gives NaN: they are copied.
            moved = average.lerp(buffer, 1 - keep) if keep else buffer
            average.copy_(torch.where(moved.isfinite(), moved, buffer))
        self.updates += 1


def _move(pairs: list[tuple[Tensor, Tensor]], keep: float) -> None:
    """Set the first tensor of each pair to ``keep * first + (1 - keep) * second``; exactly second at 0."""
    if not pairs:
        return
    average, model = ([*side] for side in zip(*pairs, strict=True))
    if keep == 0:
        torch._foreach_copy_(average, model)
    else:
        torch._foreach_lerp_(average, model, 1 - keep)
