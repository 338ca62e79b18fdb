"""What `resolve` checks of a schedule beyond its rate: the burn-in's rate, a shift, and the cycle of the
momentum.
"""

import math
from dataclasses import replace

from fastdynat.config import OptimConfig
from fastdynat.errors import UserError
from fastdynat.training.schedules import CYCLED_MOMENTUM, cycled_momentum


def resolved_cycle(optim: OptimConfig) -> OptimConfig:
    """`optim` with the momenta of its cycle filled in, if it has one.

    Raises:
        UserError: a burn-in's rate, a shift of the schedule or a cycle that cannot work.
    """
    if optim.burn_in_lr is not None and not 0 < optim.burn_in_lr < math.inf:
        raise UserError(f"burn_in_lr must be above 0, got {optim.burn_in_lr:g}")
    if optim.burn_in_lr is not None and optim.burn_in == 0:
        raise UserError(
            f"burn_in_lr {optim.burn_in_lr:g}: there is no burn-in; leave it out, or give --burn-in epochs"
        )
    if optim.schedule_ahead < 0:
        raise UserError(f"schedule_ahead must be a number of updates >= 0, got {optim.schedule_ahead}")
    given = {name: getattr(optim, name) for name in ("base_momentum", "max_momentum")}
    if not optim.cycle_momentum:
        for name, value in given.items():
            if value is not None:
                raise UserError(
                    f"{name} {value:g}: the momentum does not cycle; add --cycle-momentum, or leave it out"
                )
        return optim
    if optim.schedule not in CYCLED_MOMENTUM:
        those = " or ".join(CYCLED_MOMENTUM)
        raise UserError(
            f"cycle_momentum: schedule {optim.schedule} has no cycle; use --no-cycle-momentum, or --schedule {those}"
        )
    if optim.momentum == 0:
        raise UserError("cycle_momentum needs --momentum above 0, which a burn-in has")
    base, most = cycled_momentum(optim)
    if not 0 <= base <= most < 1:
        raise UserError(
            f"base_momentum and max_momentum must be in [0, 1) in this order, got {base:g} and {most:g}"
        )
    return replace(optim, base_momentum=base, max_momentum=most)
