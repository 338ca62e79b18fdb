"""`fastdynat compare`: several training methods on the same data, model, budget and seeds."""

from typing import TYPE_CHECKING

from fastdynat.lazy import lazy_names

if TYPE_CHECKING:
    from fastdynat.compare.config import CompareConfig, shared_config
    from fastdynat.compare.run import run_compare

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "config": (
            "CompareConfig",
            "shared_config",
        ),
        "run": ("run_compare",),
    },
)

__all__ = ["CompareConfig", "run_compare", "shared_config"]
