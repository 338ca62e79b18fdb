"""Learning-rate schedules as pure functions of the step, so that resuming needs no scheduler state."""

import math
from bisect import bisect_right
from collections.abc import Callable

from fastdynat.config import OptimConfig

# DYNAT's release: epoch 1 at lr/5, epochs 2-75 of 100 at lr, 76-90 at lr/10, 91-100 at lr/100; boundaries as shares of the run.
RELEASE_WARMUP, RELEASE_DROPS, RELEASE_GAMMA = 0.2, (0.75, 0.90), 0.1
# torch's OneCycleLR defaults (Smith & Topin 2017), cosine annealing.
ONECYCLE_START, ONECYCLE_END = 1 / 25, 1 / 25e4
# Where the peak is, as a share of the run: torch's OneCycleLR, and the fast adversarial training of Wong et al. 2020.
WARMUP = {"onecycle": 0.3, "triangular": 0.5}


def _drops(share: float, milestones: tuple[float, ...], gamma: float) -> float:
    return gamma ** bisect_right(sorted(milestones), share + 1e-9)


def _cosine(begin: float, end: float, share: float) -> float:
    return end + (begin - end) * (1 + math.cos(math.pi * share)) / 2


def _onecycle(step: int, total: int, warmup: float) -> float:
    peak = warmup * total - 1
    if peak > 0 and step <= peak:
        return _cosine(ONECYCLE_START, 1.0, step / peak)
    return _cosine(1.0, ONECYCLE_END, (step - peak) / max(total - 1 - peak, 1e-9))


def _triangular(step: int, total: int, warmup: float) -> float:
    peak = warmup * total
    return step / peak if step < peak else (total - step) / (total - peak)


def epochs_of_method(config: OptimConfig) -> int:
    """The number of epochs after the burn-in."""
    assert config.epochs is not None
    return config.epochs - config.burn_in


def schedule_factor(config: OptimConfig, steps_per_epoch: int) -> Callable[[int], float]:
    """The function step -> factor on `config.lr` for 0 <= step < epochs * steps_per_epoch; 1 in the burn-in.

    Step schedules change between epochs, cosine, one-cycle and triangular at every step.
    """
    epochs, burn_in = epochs_of_method(config), config.burn_in * steps_per_epoch
    total = epochs * steps_per_epoch
    warmup = WARMUP.get(config.schedule, 0.0) if config.warmup is None else config.warmup

    def factor(step: int) -> float:
        step -= burn_in
        if step < 0:
            return 1.0
        epoch = step // steps_per_epoch
        if config.schedule == "release":
            return RELEASE_WARMUP if epoch == 0 else _drops(epoch / epochs, RELEASE_DROPS, RELEASE_GAMMA)
        if config.schedule == "multistep":
            return _drops(epoch / epochs, config.milestones, config.gamma)
        if config.schedule == "cosine":
            return _cosine(1.0, 0.0, step / total)
        if config.schedule == "onecycle":
            return _onecycle(step, total, warmup)
        if config.schedule == "triangular":
            return _triangular(step, total, warmup)
        return 1.0

    return factor


def average_warmup(config: OptimConfig, epochs: int, steps_per_epoch: int) -> int:
    """The number of updates before the weight average begins, in a phase of the run of so many epochs."""
    return math.ceil(config.ema_warmup * epochs * steps_per_epoch - 1e-9)
