"""The weight average of a run: when it begins, and what happens to it at the end of an epoch."""

import math
from collections.abc import Callable
from typing import Literal

from fastdynat.config import OptimConfig
from fastdynat.data import TrainLoader
from fastdynat.training.average import AverageRule
from fastdynat.training.networks import NetworkSet
from fastdynat.training.recomputed_statistics import recompute_statistics
from fastdynat.training.resolved_config import ResolvedOptim
from fastdynat.training.schedules import epochs_of_method


def averages_every(optim: OptimConfig) -> Literal["step", "epoch"]:
    """The unit that ends with an update of the average: as asked, else a step (--ema) or an epoch (--swa)."""
    return ("epoch" if optim.swa else "step") if optim.ema_every == "auto" else optim.ema_every


def updates_per_epoch(optim: OptimConfig, steps_per_epoch: int) -> int:
    """The number of updates of the average in an epoch."""
    return 1 if averages_every(optim) == "epoch" else steps_per_epoch


def average_rule(optim: ResolvedOptim, epochs: int, steps_per_epoch: int) -> AverageRule:
    """The average of a phase of the run with `epochs` epochs."""
    each = updates_per_epoch(optim, steps_per_epoch)
    warmup = math.ceil(optim.ema_warmup * epochs * each - 1e-9)
    return AverageRule(optim.ema, equal=optim.swa, warmup=warmup, start=optim.ema_from * each)


class RunAverage:
    """Begins the average of `networks` anew in each phase of a run, and looks after it when an epoch ends."""

    def __init__(self, optim: ResolvedOptim, networks: NetworkSet, loader: TrainLoader) -> None:
        self._optim, self._networks, self._loader = optim, networks, loader
        self._begun = 0

    def restart(self, *, burning_in: bool) -> None:
        """Begin the average of the burn-in, or of the method."""
        optim = self._optim
        self._begun = 0 if burning_in else optim.burn_in
        if self._networks.ema is not None:
            epochs = optim.burn_in if burning_in else epochs_of_method(optim)
            self._networks.ema.restart(average_rule(optim, epochs, self._loader.steps_per_epoch))

    def end_epoch(self, epoch: int, should_stop: Callable[[], bool]) -> None:
        """Bring the average up to date after `epoch`, counted from 0; doing so twice changes nothing.

        Raises:
            Stopped: `should_stop` returned True; the statistics are those from before.
        """
        average = self._networks.ema
        if average is None:
            return
        due = epoch + 1 - self._begun
        if averages_every(self._optim) == "epoch" and average.updates < due:
            average.update()
        if self._optim.ema_buffers == "recompute":
            recompute_statistics(average.module, self._loader.epoch(epoch), should_stop)
