"""`fastdynat report`: runs as one HTML page with pictures (extra `plots`)."""

from fastdynat.report.config import ReportConfig
from fastdynat.report.run import run_report

__all__ = ["ReportConfig", "run_report"]
