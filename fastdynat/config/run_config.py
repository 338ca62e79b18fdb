"""Flags of validation, checkpoints, log and run directory."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Validation, checkpoints and log."""

    stop_at: float | None = None
    """Stop once the validation score by which the best checkpoint is chosen reaches this value, a share such
    as 0.45."""
    patience: int | None = None
    """Stop after this many validations without a better score (robust early stopping); None is never."""
    on_collapse: Literal["off", "warn", "stop"] = "warn"
    """Reaction to catastrophic overfitting to single-step attacks: validation PGD accuracy falls more than 20
    points below its best, while accuracy on attacked training images does not. Only for methods that log the
    latter."""
    save_every: float = 10.0
    """Minutes between checkpoints inside an epoch (each epoch's end is always saved)."""
    val_every: int = 1
    """Epochs between validations; the last epoch is always validated."""
    tensorboard: bool = False
    """Also write TensorBoard events (extra `tensorboard`)."""
    quiet: bool = False
    """Print no progress, only notices, warnings and errors."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(LogConfig):
    """Run directory and log."""

    run_dir: str | None = None
    """Run directory; None is a new folder under runs/."""
    overwrite: bool = False
    """Replace an existing run in --run-dir."""
    stop_after: int | None = None
    """Pause after this many epochs, as Ctrl-C would; --resume continues."""
