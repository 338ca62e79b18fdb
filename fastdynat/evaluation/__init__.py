"""Evaluation: accuracy under named attacks, and tables over runs."""

from fastdynat.evaluation.measure import Measurement, Stopped, measure
from fastdynat.evaluation.runs import EvalConfig, TestSets, evaluate_runs, measure_runs

__all__ = ["EvalConfig", "Measurement", "Stopped", "TestSets", "evaluate_runs", "measure", "measure_runs"]
