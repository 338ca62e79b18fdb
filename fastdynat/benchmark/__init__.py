"""`fastdynat bench`: how fast attack and training step are, against peers, switches and an earlier measurement."""

from fastdynat.benchmark.config import BenchConfig
from fastdynat.benchmark.run import run_bench

__all__ = ["BenchConfig", "run_bench"]
