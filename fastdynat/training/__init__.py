"""The training engine: starting and resuming runs, the loop and the step."""

from fastdynat.methods.configs import default_config, stored_config
from fastdynat.training.parts import attack_switches, build_parts, open_split
from fastdynat.training.resume import resumed_run
from fastdynat.training.start import new_run
from fastdynat.training.step import TrainStep
from fastdynat.training.trainer import Diverged, Outcome, Trainer

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
