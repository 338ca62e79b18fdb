"""Evaluation: accuracy under named attacks, and tables over runs."""

from fastdynat.evaluation.boundary_speed import BoundarySpeed, boundary_speed
from fastdynat.evaluation.measure import Stopped, measure
from fastdynat.evaluation.outcome import Measurement
from fastdynat.evaluation.runs import EvalConfig, TestSets, evaluate_runs, measure_runs

__all__ = [
    "BoundarySpeed",
    "EvalConfig",
    "Measurement",
    "Stopped",
    "TestSets",
    "boundary_speed",
    "evaluate_runs",
    "measure",
    "measure_runs",
]
