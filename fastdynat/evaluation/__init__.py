"""Evaluation: accuracy under named attacks, and tables over runs."""

from fastdynat.evaluation.measure import Measurement, Stopped, measure
from fastdynat.evaluation.runs import EvalConfig, evaluate_runs, measure_runs

__all__ = ["EvalConfig", "Measurement", "Stopped", "evaluate_runs", "measure", "measure_runs"]
