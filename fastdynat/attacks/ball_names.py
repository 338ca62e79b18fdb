"""The names of the attacks that stay in a ball: what each means is said in `named.ATTACKS`."""

import math
import re

from fastdynat.attack_engine.goal import AttackLoss
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attacks.ball_attacks import PGD
from fastdynat.attacks.base import Radii
from fastdynat.attacks.mim import MIM
from fastdynat.attacks.mim import NORMS as MIM_NORMS
from fastdynat.attacks.targets import check_rule
from fastdynat.errors import UserError

MOST_STEPS = 100_000
_STEPS = {"cw": 20, "bim": 10, "mim": 10}
_PATTERN = re.compile(
    r"(?P<kind>pgd|cw|bim|mim)(?P<steps>\d+)?(?:-k(?P<confidence>\d+(?:\.\d+)?))?(?:-(?P<restarts>\d+))?(?:@(?P<target>\w*))?"
)
_FGSM = re.compile(r"fgsm(?P<variant>-rs|-small)?(?:@(?P<target>\w*))?")


def parse_normball(name: str, radii: Radii) -> PGD | None:
    """The attack called `name`; see `named.ATTACKS`."""
    if match := _FGSM.fullmatch(name):
        return _fgsm(name, match, radii)
    match = _PATTERN.fullmatch(name)
    if match is None or (match["steps"] or _STEPS.get(match["kind"])) is None:
        return None
    kind, norm = match["kind"], radii.norm
    steps, restarts = int(match["steps"] or _STEPS[kind]), int(match["restarts"] or 1)
    start = "none" if kind in ("bim", "mim") or norm == "l0" else "uniform"
    if steps < 1 or restarts < 1:
        raise UserError(f"attack {name!r}: steps and restarts must be >= 1")
    if steps * restarts > MOST_STEPS:
        raise UserError(f"attack {name!r}: steps times restarts must be at most {MOST_STEPS}")
    if restarts > 1 and start == "none":
        remedy = "leave the restarts out" if norm == "l0" else f"use pgd{steps}-{restarts}"
        raise UserError(
            f"attack {name!r}: under {norm} {kind} starts at the image, restarts would repeat it; {remedy}"
        )
    if match["confidence"] and kind != "cw":
        raise UserError(
            f"attack {name!r}: a confidence is a part of the margin loss; use cw{steps}-k{match['confidence']}"
        )
    if kind == "mim" and norm not in MIM_NORMS:
        raise UserError(
            f"attack {name!r}: no {norm} form of mim is known, only linf and l2; use pgd{steps} under {norm}"
        )
    loss: AttackLoss = "margin" if kind == "cw" else "ce"
    spec = PGDSpec(radii.eps, radii.step_size, steps, norm=norm, start=start, restarts=restarts)
    confidence = float(match["confidence"] or math.inf)
    return (MIM if kind == "mim" else PGD)(loss, spec, _target(match), confidence)


def _fgsm(name: str, match: re.Match[str], radii: Radii) -> PGD:
    if radii.norm == "l0":
        raise UserError(f"attack {name!r}: no single step of a length finds l0's pixels; use pgd20 under l0")
    size = radii.step_size if match["variant"] == "-small" else radii.eps
    start = "uniform" if match["variant"] == "-rs" else "none"
    return PGD("ce", PGDSpec(radii.eps, size, steps=1, norm=radii.norm, start=start), _target(match))


def _target(match: re.Match[str]) -> str | None:
    return None if match["target"] is None else check_rule(match["target"])
