"""Evaluation: accuracy under named attacks, and tables over runs."""

from fastdynat.evaluation.boundary_speed import BoundarySpeed, boundary_speed
from fastdynat.evaluation.measure import Measurement, Stopped, measure
from fastdynat.evaluation.runs import EvalConfig, evaluate_runs

__all__ = ["BoundarySpeed", "EvalConfig", "Measurement", "Stopped", "boundary_speed", "evaluate_runs", "measure"]
