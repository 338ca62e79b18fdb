"""`fastdynat bench`: how fast attack and training step are, against peers, switches and an earlier
measurement.
"""

from typing import TYPE_CHECKING

from fastdynat.lazy import lazy_names

if TYPE_CHECKING:
    from fastdynat.commands.bench.bench_config import BenchConfig
    from fastdynat.commands.bench.run_bench import run_bench

__getattr__, __dir__ = lazy_names(__name__, {"bench_config": ("BenchConfig",), "run_bench": ("run_bench",)})

__all__ = ["BenchConfig", "run_bench"]
