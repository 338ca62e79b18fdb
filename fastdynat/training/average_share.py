"""Share of a weight average that is still its first weights, and the warning where it is large."""

import math

from fastdynat.training.average import AverageRule
from fastdynat.training.resolved_config import ResolvedOptim
from fastdynat.training.run_average import average_rule, averages_every, updates_per_epoch
from fastdynat.training.schedules import epochs_of_method

MUCH, MOSTLY, LITTLE = 0.1, 0.5, 0.05  # shares of the average


def averaging(rule: AverageRule, updates: int) -> bool:
    """True if one of `updates` updates has averaged, rather than copied the weights."""
    return updates > _copies(rule)


def _copies(rule: AverageRule) -> int:
    """The number of updates that copy the weights."""
    return max(rule.warmup, rule.start + 1)


def first_share(rule: AverageRule, updates: int) -> float:
    """The share of the last copied weights in an average after `updates` updates."""
    share = 1.0
    for update in range(_copies(rule), updates):
        share *= rule.keep_rate(update)
        if share < 1e-9:
            return 0.0
    return share


def average_note(rule: AverageRule, *, epochs: int, updates_per_epoch: int, unit: str = "step") -> str | None:
    """The warning before a run whose average stays mostly its first weights for long, else None.

    unit: what an update follows.
    """
    updates = epochs * updates_per_epoch
    if rule.equal:
        return None  # the first weights count as much as all others, as asked
    share = first_share(rule, updates)
    if share > MUCH:
        # So that the beginning is a twentieth of the average at the end.
        lower = LITTLE ** (1 / max(updates - _copies(rule), 1))
        return (
            f"--ema {rule.decay:g} over {updates} {unit}s: what is validated and saved will still be "
            f"{100 * share:.0f} % the weights of the average's first {unit}; use --ema-warmup 0.1, which "
            f"begins late and forgets fast, or --ema {_rounded(lower)} or less"
        )
    begun = max(rule.warmup, rule.start)
    ends = (epoch for epoch in range(1, epochs + 1) if begun < epoch * updates_per_epoch)
    grown = next(e for e in ends if first_share(rule, e * updates_per_epoch) <= MOSTLY)
    if grown > 1 and not begun:
        return (
            f"--ema {rule.decay:g}: until epoch {grown} validation sees an average that is mostly the "
            f"weights of its first {unit}; --ema-warmup 0.1 begins late and forgets fast"
        )
    return None


def run_average_note(optim: ResolvedOptim, steps_per_epoch: int) -> str | None:
    """`average_note` of a run that averages its weights."""
    epochs, unit = epochs_of_method(optim), updates_per_epoch(optim, steps_per_epoch)
    rule = average_rule(optim, epochs, steps_per_epoch)
    return average_note(rule, epochs=epochs, updates_per_epoch=unit, unit=averages_every(optim))


def _rounded(decay: float) -> str:
    """`decay` to two decimals, or to as many as tell it from 1."""
    return f"{round(decay, max(2, math.ceil(-math.log10(1 - decay)))):g}"
