"""Learning-rate schedules as pure functions of the step, so that resuming needs no scheduler state."""

import math
from bisect import bisect_right
from collections.abc import Callable

from fastdynat.config.train_checks import WARMUP
from fastdynat.methods.base import first_epoch
from fastdynat.training.resolved_config import ResolvedAttack, ResolvedOptim

# DYNAT's release: epoch 1 at lr/5, epochs 2-75 of 100 at lr, 76-90 at lr/10, 91-100 at lr/100. The boundaries
# are shares of the run.
RELEASE_WARMUP, RELEASE_DROPS, RELEASE_GAMMA = 0.2, (0.75, 0.90), 0.1
# torch's OneCycleLR defaults (Smith & Topin 2017), cosine annealing.
ONECYCLE_START, ONECYCLE_END = 1 / 25, 1 / 25e4
# The momentum at the peak and at the ends: the defaults of torch's OneCycleLR and CyclicLR.
CYCLED_MOMENTUM = {"onecycle": (0.85, 0.95), "triangular": (0.8, 0.9)}


def _drops(share: float, milestones: tuple[float, ...], gamma: float) -> float:
    return gamma ** bisect_right(sorted(milestones), share + 1e-9)


def _cosine(begin: float, end: float, share: float) -> float:
    return end + (begin - end) * (1 + math.cos(math.pi * share)) / 2


def _onecycle(step: int, total: int, warmup: float, ends: tuple[float, float, float]) -> float:
    """Cosine from the first of `ends` to the second, the peak, and from there to the third."""
    begin, top, end = ends
    peak = warmup * total - 1
    if peak > 0 and step <= peak:
        return _cosine(begin, top, step / peak)
    return _cosine(top, end, min((step - peak) / max(total - 1 - peak, 1e-9), 1.0))


def _triangular(step: int, total: int, warmup: float, floor: float = 0.0) -> float:
    peak = warmup * total
    return step / peak if step < peak else floor + (1 - floor) * max(total - step, 0) / (total - peak)


def _floored_cosine(step: int, total: int, rise: float, config: ResolvedOptim) -> float:
    """Cosine from 1 to ``min_lr / lr`` over all `total` positions, or over those after a prefixed `rise`."""
    floor, skipped = config.min_lr / config.lr, rise if config.warmup_prefix else 0.0
    return _cosine(1.0, floor, min((step - skipped) / (total - skipped), 1.0))


def epochs_of_method(config: ResolvedOptim) -> int:
    """The number of epochs after the burn-in."""
    return config.epochs - config.burn_in


def schedule_epochs(config: ResolvedOptim) -> int:
    """The number of epochs that the schedule is stretched over."""
    return epochs_of_method(config) if config.schedule_epochs is None else config.schedule_epochs


def usual_warmup_lr(config: ResolvedOptim) -> float:
    """The rate at the first update of a linear warm-up: as given, else a hundredth of the peak rate."""
    return config.lr / 100 if config.warmup_lr is None else config.warmup_lr


def attack_steps(attack: ResolvedAttack, epochs: int) -> Callable[[int], int]:
    """The function epoch of the method -> the attack's number of steps; `epochs` are those of the method."""
    early = attack.steps if attack.early_steps is None else attack.early_steps
    until = first_epoch(attack.early_share, epochs)
    return lambda epoch: early if epoch < until else attack.steps


def schedule_factor(config: ResolvedOptim, steps_per_epoch: int) -> Callable[[int], float]:
    """The function update -> factor on `config.lr` for 0 <= update < epochs * steps_per_epoch.

    In the burn-in it is ``burn_in_lr / lr``, or 1. Step schedules change between epochs; cosine, one-cycle,
    triangular and a linear warm-up at every update, or between epochs with `schedule_by` "epoch"."""
    epochs, warmup = schedule_epochs(config), _peak(config)
    position, total = _position(config, steps_per_epoch), _total(config, steps_per_epoch)
    positions_per_epoch = _positions_per_epoch(config, steps_per_epoch)
    before = 1.0 if config.burn_in_lr is None else config.burn_in_lr / config.lr
    rise, first = config.warmup_epochs * positions_per_epoch, usual_warmup_lr(config) / config.lr

    def factor(update: int) -> float:
        step = update - config.burn_in * steps_per_epoch
        if step < 0:
            return before
        at = position(step)
        epoch = at // positions_per_epoch
        if at < rise:
            return first + (1 - first) * at / rise
        if config.schedule == "release":
            return RELEASE_WARMUP if epoch == 0 else _drops(epoch / epochs, RELEASE_DROPS, RELEASE_GAMMA)
        if config.schedule == "multistep":
            return _drops(epoch / epochs, config.milestones, config.gamma)
        if config.schedule == "cosine":
            return _floored_cosine(at, total, rise, config)
        if config.schedule == "onecycle":
            return _onecycle(at, total, warmup, (ONECYCLE_START, 1.0, ONECYCLE_END))
        if config.schedule == "triangular":
            return _triangular(at, total, warmup, config.min_lr / config.lr)
        return 1.0

    return factor


def momentum_at(config: ResolvedOptim, steps_per_epoch: int) -> Callable[[int], float]:
    """The function update -> SGD momentum: `config.momentum`, or after the burn-in the schedule's cycle."""
    position, total = _position(config, steps_per_epoch), _total(config, steps_per_epoch)
    warmup = _peak(config)
    base, most = cycled_momentum(config) if config.cycle_momentum else (config.momentum, config.momentum)

    def momentum(update: int) -> float:
        step = update - config.burn_in * steps_per_epoch
        if step < 0 or not config.cycle_momentum:
            return config.momentum
        if config.schedule == "onecycle":
            return _onecycle(position(step), total, warmup, (most, base, most))
        return most - (most - base) * _triangular(position(step), total, warmup)

    return momentum


def cycled_momentum(config: ResolvedOptim) -> tuple[float, float]:
    """The momentum (at the peak rate, at the least rate) of a cycled schedule: as given, else torch's."""
    base, most = CYCLED_MOMENTUM[config.schedule]
    return (
        base if config.base_momentum is None else config.base_momentum,
        most if config.max_momentum is None else config.max_momentum,
    )


def _peak(config: ResolvedOptim) -> float:
    return WARMUP.get(config.schedule, 0.0) if config.warmup is None else config.warmup


def _total(config: ResolvedOptim, steps_per_epoch: int) -> int:
    """The number of positions of the schedule (see `_position`)."""
    return schedule_epochs(config) * _positions_per_epoch(config, steps_per_epoch)


def _positions_per_epoch(config: ResolvedOptim, steps_per_epoch: int) -> int:
    return 1 if config.schedule_by == "epoch" else steps_per_epoch


def _position(config: ResolvedOptim, steps_per_epoch: int) -> Callable[[int], int]:
    """The function update of the method -> position in its schedule: the update, or its epoch."""
    unit = steps_per_epoch if config.schedule_by == "epoch" else 1
    return lambda step: step // unit + config.schedule_ahead
