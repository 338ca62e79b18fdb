"""The training engine: sessions, the loop and the step."""

from fastdynat.engine.session import (
    attack_switches,
    build_parts,
    new_run,
    open_split,
    resumed_run,
)
from fastdynat.engine.step import TrainStep
from fastdynat.engine.trainer import Diverged, Outcome, Trainer
from fastdynat.methods.configs import default_config, stored_config

__all__ = [
    "Diverged",
    "Outcome",
    "TrainStep",
    "Trainer",
    "attack_switches",
    "build_parts",
    "default_config",
    "new_run",
    "open_split",
    "resumed_run",
    "stored_config",
]
