"""The training engine: sessions, the loop and the step."""

from fastdynat.engine.session import default_config, new_run, resumed_run, stored_config
from fastdynat.engine.trainer import Diverged, Outcome, Trainer

__all__ = ["Diverged", "Outcome", "Trainer", "default_config", "new_run", "resumed_run", "stored_config"]
