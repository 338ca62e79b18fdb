"""Names of the attacks that look for the nearest adversarial image."""

import re

from fastdynat.attacks.base import Radii, Search
from fastdynat.attacks.carlini_wagner import CarliniL2
from fastdynat.attacks.deepfool import DeepFool
from fastdynat.attacks.sigma_zero import SigmaZero

_PATTERN = re.compile(
    r"(?P<kind>cwl2|deepfool|deepfool-linf|sigmazero)(?:-(?P<binary>\d+)x(?P<steps>\d+)|(?P<only>\d+))?"
)


def parse_minimal(name: str, radii: Radii) -> Search | None:
    """``cwl2``, ``cwl2-BxK``, ``deepfool``, ``deepfoolK``, ``deepfool-linf``, ``sigmazero``, ``sigmazeroK``.

    A verdict is about the ball of `radii` where it has the attack's own norm; else an image is robust if
    nothing was found.
    """
    match = _PATTERN.fullmatch(name)
    if match is None:
        return None
    kind, binary, only = match["kind"], match["binary"], match["only"]
    norm = {"cwl2": "l2", "deepfool": "l2", "deepfool-linf": "linf", "sigmazero": "l0"}[kind]
    eps = radii.eps if radii.norm == norm else float("inf")
    if kind == "cwl2" and binary is not None:
        runs, steps = int(binary), int(match["steps"])
        if (
            runs == 1
        ):  # no search for c: the fixed one of torchattacks; a tenth of its few steps would be too short to judge by
            return CarliniL2(binary_steps=1, steps=steps, c=1.0, abort=False, eps=eps)
        return CarliniL2(binary_steps=runs, steps=steps, eps=eps)
    if binary is not None or (kind == "cwl2" and only is not None):
        return None
    if kind == "cwl2":
        return CarliniL2(eps=eps)
    if kind == "sigmazero":
        return SigmaZero(steps=int(only or SigmaZero.steps), eps=eps)
    return DeepFool(norm=norm, steps=int(only or DeepFool.steps), eps=eps)
