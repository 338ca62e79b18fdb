"""`fastdynat bench`: how fast attack and training step are, against peers, switches and an earlier measurement."""

from typing import TYPE_CHECKING

from fastdynat.lazy import lazy_names

if TYPE_CHECKING:
    from fastdynat.benchmark.config import BenchConfig
    from fastdynat.benchmark.run import run_bench

__getattr__, __dir__ = lazy_names(__name__, {"config": ("BenchConfig",), "run": ("run_bench",)})

__all__ = ["BenchConfig", "run_bench"]
