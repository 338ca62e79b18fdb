"""`fastdynat compare`: several training methods on the same data, model, budget and seeds."""

from typing import TYPE_CHECKING

from fastdynat.lazy import lazy_names

if TYPE_CHECKING:
    from fastdynat.commands.compare.compare_config import CompareConfig, shared_config
    from fastdynat.commands.compare.run_compare import run_compare

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "compare_config": (
            "CompareConfig",
            "shared_config",
        ),
        "run_compare": ("run_compare",),
    },
)

__all__ = ["CompareConfig", "run_compare", "shared_config"]
