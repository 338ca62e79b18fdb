"""Hyperparameters of projected gradient descent."""

import math
from dataclasses import dataclass

from torch import Tensor

from fastdynat.attack_engine.input_checks import check_count, check_number
from fastdynat.attack_engine.steps import NORMS, STARTS
from fastdynat.errors import UserError, unknown_name
from fastdynat.ops import Size

ALGORITHMS = ("pgd", "apgd")
TARGETS = ("none", "random", "least")


@dataclass(frozen=True)
class PGDSpec:
    """Hyperparameters of one attack. Sizes in [0, 1] pixel units.

    Under L0, `eps` is a number of pixels and `step_size` an L1 length. The attack "pgd" returns the last
    iterate: it neither keeps the best loss nor stops at misclassified images. With several restarts an image
    keeps the run that fools the network, or else the run with the highest loss.

    Attributes:
        algorithm: "pgd", or "apgd": `adaptive_ascend`, which adapts its step size and returns the point with
            the highest loss.
        target: "none", or attack each image towards one class other than its own: "random", drawn uniformly,
            or "least", the one that the network finds least likely (`aimed`).
    """

    eps: float
    step_size: float
    steps: int
    norm: str = "linf"
    start: str = "uniform"
    restarts: int = 1
    algorithm: str = "pgd"
    target: str = "none"

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise unknown_name("norm", self.norm, NORMS)
        if self.start not in STARTS:
            raise unknown_name("start", self.start, STARTS)
        if self.algorithm not in ALGORITHMS:
            raise unknown_name("attack algorithm", self.algorithm, ALGORITHMS)
        if self.target not in TARGETS:
            raise unknown_name("target", self.target, TARGETS)
        if self.algorithm == "apgd" and self.norm == "l0":
            raise UserError("apgd is defined for linf, l2 and l1, got norm l0; use the algorithm pgd")
        check_number("eps", self.eps)
        check_number("step_size", self.step_size)
        if self.eps <= 0 or (self.norm == "linf" and self.eps > 1):
            raise UserError(f"eps must be in (0, 1] pixel units, got {self.eps:g}; write 8/255")
        if self.norm == "l0" and self.eps != int(self.eps):
            raise UserError(f"eps under l0 is a whole number of pixels that may change, got {self.eps:g}")
        if self.norm == "l0" and self.start != "none":
            # Noise uses up the pixels that may change; others replace them only after moving further.
            raise UserError(
                f"start must be none under l0, got {self.start}: "
                "noise would keep the attack from choosing pixels"
            )
        if not 0 < self.step_size < math.inf:
            raise UserError(f"step_size must be above 0 and finite (pixel units), got {self.step_size:g}")
        check_count("steps", self.steps, 0)
        check_count("restarts", self.restarts, 1)


def sizes_of(spec: PGDSpec, sizes: Tensor | None) -> tuple[Size, Size]:
    """(eps, step size): those of `spec`, or the two numbers of `sizes`, which stay on the device."""
    if sizes is None:
        return spec.eps, spec.step_size
    eps, step_size = sizes
    return eps, step_size
