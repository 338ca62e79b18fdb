"""Evaluation: accuracy under named attacks, and tables over runs."""

from fastdynat.evaluation.autoattack import AutoAttack
from fastdynat.evaluation.boundary_speed import BoundarySpeed, boundary_speed
from fastdynat.evaluation.config import EvalConfig
from fastdynat.evaluation.curves import EpsCurve, accuracy_over_eps, curve_of_distances
from fastdynat.evaluation.margins import Margins, margins
from fastdynat.evaluation.masking import MaskingReport, check_masking
from fastdynat.evaluation.measure import KeptReplica, Stopped, measure
from fastdynat.evaluation.outcome import Measurement
from fastdynat.evaluation.plan import TestSets
from fastdynat.evaluation.reference import run_reference
from fastdynat.evaluation.runs import evaluate_runs, measure_runs
from fastdynat.evaluation.saliency import Explanation, explain
from fastdynat.evaluation.store import read_measurements
from fastdynat.evaluation.transfer import TransferMatrix, transfer_matrix

__all__ = [
    "AutoAttack",
    "BoundarySpeed",
    "EpsCurve",
    "EvalConfig",
    "Explanation",
    "KeptReplica",
    "Margins",
    "MaskingReport",
    "Measurement",
    "Stopped",
    "TestSets",
    "TransferMatrix",
    "accuracy_over_eps",
    "boundary_speed",
    "check_masking",
    "curve_of_distances",
    "evaluate_runs",
    "explain",
    "margins",
    "measure",
    "measure_runs",
    "read_measurements",
    "run_reference",
    "transfer_matrix",
]
