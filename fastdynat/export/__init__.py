"""Hand a run's network over: to RobustBench, as a torch.export program, or as ONNX; each file is checked before it is kept."""

from fastdynat.export.run import ExportConfig, export_run

__all__ = ["ExportConfig", "export_run"]
