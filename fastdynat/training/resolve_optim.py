"""Optimiser and schedule of a `ResolvedConfig`: epochs, peak rate, burn-in and the cycle of the momentum."""

import math
from dataclasses import replace
from typing import Any

from fastdynat.config import OptimConfig, TrainConfig
from fastdynat.config.optimizer_kinds import (
    OPTIMIZER_KINDS,
    SGD_KIND,
    usual_betas,
    usual_decay,
    usual_eps,
)
from fastdynat.config.train_checks import WARMUP
from fastdynat.data import DatasetInfo
from fastdynat.errors import UserError
from fastdynat.training.resolved_config import ResolvedOptim, filled_in
from fastdynat.training.schedules import (
    CYCLED_MOMENTUM,
    cycled_momentum,
    schedule_epochs,
    usual_warmup_lr,
)

EPOCHS, USUAL_EPOCHS = {"digits": 15}, 100
# Of SGD. Measured on the digits for DYNAT (one seed, validation PGD-10): 85.4 % at 0.03, 86.8 % at 0.1, which
# is the same within the error of their 144 images.
SGD_LR = {"digits": 0.03}


def resolved_optim(config: TrainConfig[Any], info: DatasetInfo) -> ResolvedOptim:
    """`config.optim` with the epochs and the rate that are usual for the dataset `info`.

    Raises:
        UserError: a burn-in, a shift of the schedule or a cycle that cannot work.
    """
    asked = config.optim
    epochs = EPOCHS.get(info.name, USUAL_EPOCHS) if asked.epochs is None else asked.epochs
    lr = _usual_lr(asked, info) if asked.lr is None else asked.lr
    if not 0 <= asked.burn_in < epochs:
        raise UserError(f"burn_in must be a number of epochs below --epochs ({epochs}), got {asked.burn_in}")
    if asked.burn_in > 0 and config.data.labelled is not None:
        raise UserError(
            f"burn_in {asked.burn_in}: natural training needs every label; leave --labelled out, or --burn-in"
        )
    if asked.ema_from >= epochs - asked.burn_in:
        raise UserError(
            f"ema_from must be below the {epochs - asked.burn_in} epochs of the method, got {asked.ema_from}"
        )
    _check_burn_in_rate(asked)
    if asked.schedule_ahead < 0:
        raise UserError(f"schedule_ahead must be a number of updates >= 0, got {asked.schedule_ahead}")
    numbers = {
        "weight_decay": usual_decay(asked),
        "opt_betas": usual_betas(asked),
        "opt_eps": usual_eps(asked),
    }
    optim = _with_cycle(filled_in(ResolvedOptim, asked, epochs=epochs, lr=lr, **numbers))
    optim = _with_warmup(optim)
    return replace(optim, warmup=WARMUP.get(optim.schedule) if optim.warmup is None else optim.warmup)


def _usual_lr(optim: OptimConfig, info: DatasetInfo) -> float:
    usual = OPTIMIZER_KINDS[optim.opt].lr
    return SGD_LR.get(info.name, usual) if optim.opt == SGD_KIND else usual


def _with_warmup(optim: ResolvedOptim) -> ResolvedOptim:
    """`optim` with the first rate of its linear warm-up filled in, if it has one."""
    for name in ("warmup_lr", "min_lr"):
        if (value := getattr(optim, name)) is not None and value > optim.lr:
            raise UserError(f"{name} must be at most lr ({optim.lr:g}), got {value:g}")
    if optim.warmup_epochs == 0:
        return optim
    if optim.warmup_epochs >= (epochs := schedule_epochs(optim)):
        raise UserError(
            f"warmup_epochs must be below the {epochs} epochs of the schedule, got {optim.warmup_epochs:g}"
        )
    return replace(optim, warmup_lr=usual_warmup_lr(optim))


def _check_burn_in_rate(optim: OptimConfig) -> None:
    rate = optim.burn_in_lr
    if rate is not None and not 0 < rate < math.inf:
        raise UserError(f"burn_in_lr must be above 0, got {rate:g}")
    if rate is not None and optim.burn_in == 0:
        raise UserError(f"burn_in_lr {rate:g}: there is no burn-in; leave it out, or give --burn-in epochs")


def _with_cycle(optim: ResolvedOptim) -> ResolvedOptim:
    """`optim` with the momenta of its cycle filled in, if it has one."""
    if not optim.cycle_momentum:
        for name in ("base_momentum", "max_momentum"):
            if (value := getattr(optim, name)) is not None:
                raise UserError(
                    f"{name} {value:g}: the momentum does not cycle; add --cycle-momentum, or leave it out"
                )
        return optim
    if optim.schedule not in CYCLED_MOMENTUM:
        those = " or ".join(CYCLED_MOMENTUM)
        raise UserError(
            f"cycle_momentum: schedule {optim.schedule} has no cycle; "
            f"use --no-cycle-momentum, or --schedule {those}"
        )
    if optim.momentum == 0:
        raise UserError("cycle_momentum needs --momentum above 0, which a burn-in uses")
    base, most = cycled_momentum(optim)
    if not 0 <= base <= most < 1:
        raise UserError(
            f"base_momentum and max_momentum must be in [0, 1) in this order, got {base:g} and {most:g}"
        )
    return replace(optim, base_momentum=base, max_momentum=most)
