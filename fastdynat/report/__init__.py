"""`fastdynat report`: runs as one HTML page with pictures (extra `plots`)."""

from typing import TYPE_CHECKING

from fastdynat.lazy import lazy_names

if TYPE_CHECKING:
    from fastdynat.report.config import ReportConfig
    from fastdynat.report.run import run_report

__getattr__, __dir__ = lazy_names(__name__, {"config": ("ReportConfig",), "run": ("run_report",)})

__all__ = ["ReportConfig", "run_report"]
