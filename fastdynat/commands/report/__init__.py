"""`fastdynat report`: runs as one HTML page with pictures (extra `plots`)."""

from typing import TYPE_CHECKING

from fastdynat.lazy import lazy_names

if TYPE_CHECKING:
    from fastdynat.commands.report.report_config import ReportConfig
    from fastdynat.commands.report.run_report import run_report

__getattr__, __dir__ = lazy_names(
    __name__, {"report_config": ("ReportConfig",), "run_report": ("run_report",)}
)

__all__ = ["ReportConfig", "run_report"]
