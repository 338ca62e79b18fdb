"""Evaluation of a network: accuracy under named attacks, AutoAttack, masking checks, margins, transfer and
saliency.
"""

from fastdynat.evaluation.autoattack import AutoAttack
from fastdynat.evaluation.boundary_speed import BoundarySpeed, boundary_speed
from fastdynat.evaluation.curves import EpsCurve, accuracy_over_eps, curve_of_distances
from fastdynat.evaluation.margins import Margins, margins
from fastdynat.evaluation.masking import MaskingReport, check_masking
from fastdynat.evaluation.measure import KeptReplica, Stopped, measure
from fastdynat.evaluation.outcome import Measurement
from fastdynat.evaluation.saliency import Explanation, explain
from fastdynat.evaluation.transfer import TransferMatrix, transfer_matrix

__all__ = [
    "AutoAttack",
    "BoundarySpeed",
    "EpsCurve",
    "Explanation",
    "KeptReplica",
    "Margins",
    "MaskingReport",
    "Measurement",
    "Stopped",
    "TransferMatrix",
    "accuracy_over_eps",
    "boundary_speed",
    "check_masking",
    "curve_of_distances",
    "explain",
    "margins",
    "measure",
    "transfer_matrix",
]
