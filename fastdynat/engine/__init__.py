"""The training engine: starting and resuming runs, the loop and the step."""

from fastdynat.engine.build import attack_switches, build_parts, open_split
from fastdynat.engine.resume import resumed_run
from fastdynat.engine.start import new_run
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
