"""PGD with restarts and targets (Madry et al. 2018, arXiv 1706.06083): ``pgdK`` and ``pgdK-R``.

FGSM, BIM, C&W-inf and MIM are built on it, each in a file of its own.
"""

import math
import re
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.attack_result import AttackResult
from fastdynat.attack_engine.goal import AttackGoal, AttackLoss
from fastdynat.attack_engine.pgd import ascend
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attack_engine.shrinking_batch import Tick, no_tick
from fastdynat.attack_engine.steps import start_point
from fastdynat.attack_engine.target_classes import check_rule, target_classes
from fastdynat.attacks.registry import Radii, register
from fastdynat.attacks.restarts import until_broken
from fastdynat.errors import UserError
from fastdynat.ops.image_draws import Randomness

MOST_STEPS = 100_000  # of all restarts together


@dataclass(frozen=True)
class RestartedPGD:
    """Projected gradient ascent with restarts and targets; the last iterate of each run counts.

    The first run attacks every image, misclassified ones too; further restarts and targets attack only the
    images that are still robust. Whatever the target, an image is robust if the network still gives its true
    label: reaching the target is not required.

    Attributes:
        loss: is maximised, or minimised for a target.
        spec: the numbers of a run.
        target: a rule of `target_classes`; None attacks away from the label.
        confidence: of the margin, see `AttackGoal`.
    """

    STORED_AS: ClassVar[str] = "PGD"  # its name in stored measurements

    loss: AttackLoss
    spec: PGDSpec
    target: str | None = None
    confidence: float = math.inf

    @property
    def norm(self) -> str:
        return self.spec.norm

    def __call__(
        self,
        ascent: Ascent,
        x: Tensor,
        labels: Tensor,
        *,
        generator: Randomness = None,
        tick: Tick = no_tick,
    ) -> AttackResult:
        spec, classes = self.spec, labels[:, None]
        if self.target is not None:
            with torch.no_grad():
                logits = ascent.logits(ascent.to_model_input(x))
                classes = target_classes(self.target, logits, labels, generator=generator)

        def attempt(towards: Tensor, rows: Tensor, tick: Tick) -> AttackResult:
            # Drawn for all images, so that where one starts does not depend on which others still stand.
            start = start_point(x, spec.start, norm=spec.norm, eps=spec.eps, generator=generator)
            goal = AttackGoal(
                self.loss, towards[rows], targeted=self.target is not None, confidence=self.confidence
            )
            return self.climb(ascent, x[rows], goal, start[rows], tick)

        attempts = [partial(attempt, towards) for towards in classes.unbind(1) for _ in range(spec.restarts)]
        return until_broken(ascent, x, labels, attempts, tick=tick)

    def climb(self, ascent: Ascent, x: Tensor, goal: AttackGoal, x_start: Tensor, tick: Tick) -> AttackResult:
        """One run from `x_start`."""
        return ascend(ascent, x, goal, self.spec, x_start=x_start, tick=tick)


@register(
    r"pgd(?P<steps>\d+)(?:-k(?P<confidence>\d+(?:\.\d+)?))?(?:-(?P<restarts>\d+))?(?:@(?P<target>\w*))?",
    help={
        "pgd20": "pgdK: K steps on the cross-entropy from a uniform start (Madry et al. 2018); l1 is SLIDE; "
        "l0 counts pixels",
        "pgd50-10": "pgdK-R: R restarts, each on the images that are still robust; the last iterate of each "
        "counts",
        "pgd20@second": "targeted pgd, fgsm, bim, mim or cw: towards the most likely other class (@second), "
        "the least likely one (@least), @random, @next, or @all in turn",
    },
    half_precision=True,
)
def pgd_attack(match: re.Match[str], radii: Radii) -> RestartedPGD:
    """PGD on the cross-entropy; under L0 it starts at the image."""
    return from_match(match, radii, start="none" if radii.norm == "l0" else "uniform")


def from_match(
    match: re.Match[str],
    radii: Radii,
    *,
    start: str,
    steps: int = 0,
    loss: AttackLoss = "ce",
    kind: type[RestartedPGD] = RestartedPGD,
) -> RestartedPGD:
    """The attack whose options are the groups steps, restarts, confidence and target of `match`.

    Args:
        steps: where the name has no number of them.

    Raises:
        UserError: numbers that cannot work.
    """
    name, norm = match.string, radii.norm
    steps, restarts = int(match["steps"] or steps), int(match["restarts"] or 1)
    if steps < 1 or restarts < 1:
        raise UserError(f"attack {name!r}: steps and restarts must be >= 1")
    if steps * restarts > MOST_STEPS:
        raise UserError(f"attack {name!r}: steps times restarts must be at most {MOST_STEPS}")
    if restarts > 1 and start == "none":
        remedy = "leave the restarts out" if norm == "l0" else f"use pgd{steps}-{restarts}"
        raise UserError(
            f"attack {name!r}: under {norm} it starts at the image, restarts would repeat it; {remedy}"
        )
    if match["confidence"] and loss != "margin":
        raise UserError(
            f"attack {name!r}: a confidence belongs to the margin loss; use cw{steps}-k{match['confidence']}"
        )
    spec = PGDSpec(radii.eps, radii.step_size, steps, norm=norm, start=start, restarts=restarts)
    return kind(loss, spec, target_rule(match), float(match["confidence"] or math.inf))


def target_rule(match: re.Match[str]) -> str | None:
    """The rule behind ``@`` in the name, if there is one."""
    return None if match["target"] is None else check_rule(match["target"])
