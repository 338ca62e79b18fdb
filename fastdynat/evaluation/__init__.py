"""Evaluation: accuracy under named attacks, and tables over runs."""

from fastdynat.evaluation.autoattack import AutoAttack
from fastdynat.evaluation.boundary_speed import BoundarySpeed, boundary_speed
from fastdynat.evaluation.config import EvalConfig
from fastdynat.evaluation.measure import Stopped, measure
from fastdynat.evaluation.outcome import Measurement
from fastdynat.evaluation.plan import TestSets
from fastdynat.evaluation.reference import run_reference
from fastdynat.evaluation.runs import evaluate_runs, measure_runs
from fastdynat.evaluation.store import read_measurements

__all__ = [
    "AutoAttack",
    "BoundarySpeed",
    "EvalConfig",
    "Measurement",
    "Stopped",
    "TestSets",
    "boundary_speed",
    "evaluate_runs",
    "measure",
    "measure_runs",
    "read_measurements",
    "run_reference",
]
