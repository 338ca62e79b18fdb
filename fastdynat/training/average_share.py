"""Share of a weight average that is still its first weights, and the warning where it is large."""

from fastdynat.training.average import keep_rate
from fastdynat.training.resolved_config import ResolvedOptim
from fastdynat.training.schedules import average_warmup, epochs_of_method

MUCH, MOSTLY, LITTLE = 0.1, 0.5, 0.05  # shares of the average


def first_share(decay: float, *, warmup: int, updates: int) -> float:
    """The share of the last copied weights in an average after `updates` updates; the first `warmup` copy."""
    share = 1.0
    for update in range(max(warmup, 1), updates):
        share *= keep_rate(decay, warmup=warmup, updates=update)
        if share < 1e-9:
            return 0.0
    return share


def average_note(decay: float, *, warmup: int, epochs: int, steps_per_epoch: int) -> str | None:
    """The warning before a run whose average stays mostly its first weights for long, else None."""
    steps = epochs * steps_per_epoch
    share = first_share(decay, warmup=warmup, updates=steps)
    if share > MUCH:
        # So that the beginning is a twentieth of the average at the end.
        lower = LITTLE ** (1 / max(steps - max(warmup, 1), 1))
        return (
            f"--ema {decay:g} over {steps} steps: what is validated and saved will still be "
            f"{100 * share:.0f} % the weights of the average's first step; use --ema-warmup 0.1, which "
            f"begins late and forgets fast, or --ema {lower:.2g} or less"
        )
    ends = (epoch for epoch in range(1, epochs + 1) if warmup < epoch * steps_per_epoch)
    grown = next(e for e in ends if first_share(decay, warmup=warmup, updates=e * steps_per_epoch) <= MOSTLY)
    if grown > 1 and not warmup:
        return (
            f"--ema {decay:g}: until epoch {grown} validation sees an average that is mostly the weights of "
            "its first step; --ema-warmup 0.1 begins late and forgets fast"
        )
    return None


def run_average_note(optim: ResolvedOptim, steps_per_epoch: int) -> str | None:
    """`average_note` of a run that averages its weights."""
    epochs = epochs_of_method(optim)
    warmup = average_warmup(optim, epochs, steps_per_epoch)
    return average_note(optim.ema, warmup=warmup, epochs=epochs, steps_per_epoch=steps_per_epoch)
