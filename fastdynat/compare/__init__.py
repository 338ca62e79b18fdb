"""`fastdynat compare`: several training methods on the same data, model, budget and seeds."""

from fastdynat.compare.config import CompareConfig, shared_config
from fastdynat.compare.run import run_compare

__all__ = ["CompareConfig", "run_compare", "shared_config"]
