"""Configuration changes permitted on resume: those under which the run so far would have been identical."""

from pathlib import Path
from typing import Any

from fastdynat.config import TrainConfig
from fastdynat.errors import UserError
from fastdynat.methods import method_class
from fastdynat.training.parts import attack_steps
from fastdynat.training.schedules import epochs_of_method, schedule_factor
from fastdynat.training.state import identity


def check_changes(stored: TrainConfig[Any], asked: TrainConfig[Any]) -> None:
    """Refuse a change of what a run keeps for life; both configurations are resolved."""
    before, after = identity(stored), identity(asked)
    changed = [key for key in before if before[key] != after.get(key)]
    if changed:
        key = changed[0]
        raise UserError(changed_key(key, before[key], after.get(key)))


def changed_key(key: str, before: object, after: object) -> str:
    """The refusal of another value of `key`."""
    return f"--resume goes on exactly as begun: {key} is {before} in this run, not {after}; start a new run to change it"


def check_trained(
    path: Path, stored: TrainConfig[Any], asked: TrainConfig[Any], state: dict[str, Any]
) -> None:
    """Refuse to end where the run has been already. `state`: of its newest checkpoint."""
    epoch, end = state.get("epoch", 0), asked.optim.epochs
    if end != stored.optim.epochs and end is not None and isinstance(epoch, int) and end <= epoch:
        raise UserError(
            f"{path} has already trained {epoch} epochs: --epochs must be >= {epoch + 1} to go on, got {end}"
        )


def check_epochs(stored: TrainConfig[Any], asked: TrainConfig[Any], steps_per_epoch: int) -> None:
    """Allow another number of epochs where the schedule so far is the same under both."""
    if stored.optim.epochs == asked.optim.epochs:
        return
    assert stored.optim.epochs is not None
    assert asked.optim.epochs is not None
    epochs = range(min(stored.optim.epochs, asked.optim.epochs))
    steps = range(len(epochs) * steps_per_epoch)
    before, after = (schedule_factor(c.optim, steps_per_epoch) for c in (stored, asked))
    early = attack_steps(stored), attack_steps(asked)
    if any(early[0](epoch) != early[1](epoch) for epoch in epochs):
        raise UserError(
            f"--early-share depends on the number of epochs ({stored.optim.epochs} in this run, {asked.optim.epochs} asked), "
            "and other epochs would have had fewer attack steps; keep --epochs"
        )
    if stored.optim.ema_warmup > 0:
        raise UserError(
            f"--ema-warmup depends on the number of epochs ({stored.optim.epochs} in this run, {asked.optim.epochs} asked); "
            "keep --epochs"
        )
    if any(_constants(stored, epoch) != _constants(asked, epoch) for epoch in epochs):
        raise UserError(
            f"method {stored.method} changes its loss at fractions of the number of epochs ({stored.optim.epochs} in this run, "
            f"{asked.optim.epochs} asked); keep --epochs"
        )
    if any(before(s) != after(s) for s in steps):
        raise UserError(
            f"the {asked.optim.schedule} schedule depends on the number of epochs ({stored.optim.epochs} in this run, "
            f"{asked.optim.epochs} asked); start with --epochs {asked.optim.epochs} --stop-after {stored.optim.epochs} to pause"
        )


def _constants(config: TrainConfig[Any], epoch: int) -> tuple[float, ...]:
    """What the method of a resolved configuration computes from the epoch."""
    method = method_class(config.method)(config.options)
    method.epoch, method.epochs = max(0, epoch - config.optim.burn_in), epochs_of_method(config.optim)
    return method.constants()
