"""Evaluation of a network, as a library user calls it.

- `measure`: accuracy under one attack, as a `Measurement` (`outcome`); `measure_on_ranks`: by all processes;
- `autoattack`: AutoAttack by the calls of its package, on `staged`;
- `curves`, `margins`, `transfer`: accuracy over the radius, distances, transfer between networks;
- `masking`, on `probes`: signs of masked gradients; `defences`: warnings of an unreliable evaluation;
- `saliency`: what the network looks at; `boundary_speed`: how training moves the decision boundary;
- `fidelity`: the fast attack against the reference; `halving`: smaller batches when memory runs out.
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
