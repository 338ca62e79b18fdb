"""Hand a run's network over: to RobustBench, as a torch.export program, or as ONNX; each file is checked
before it is kept.
"""

from typing import TYPE_CHECKING

from fastdynat.lazy import lazy_names

if TYPE_CHECKING:
    from fastdynat.commands.export.export_config import ExportConfig
    from fastdynat.commands.export.run_export import export_run

__getattr__, __dir__ = lazy_names(
    __name__, {"export_config": ("ExportConfig",), "run_export": ("export_run",)}
)

__all__ = ["ExportConfig", "export_run"]
