"""Attacks of the evaluation that stay in a ball: FGSM, BIM, PGD and C&W-inf, untargeted and targeted, by
name.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.attack_result import AttackResult
from fastdynat.attack_engine.goal import AttackGoal, AttackLoss
from fastdynat.attack_engine.pgd import ascend
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attack_engine.shrinking_batch import Tick, no_tick
from fastdynat.attack_engine.steps import start_point
from fastdynat.attacks.restarts import until_broken
from fastdynat.attacks.targets import target_classes


@dataclass(frozen=True)
class PGD:
    """Projected gradient ascent, with restarts and targets; the last iterate counts (no best one, no early
    stop within a run).

    The first run is on every image, also on misclassified ones; further restarts and targets only on images
    that still stand. Whatever the target, an image is robust if the network still gives its true label:
    arriving at the target is not asked for.

    Attributes:
        loss: what is driven up, or for a target down.
        spec: the numbers of a run.
        target: a rule of `target_classes`; None drives away from the label.
        confidence: of the margin, see `AttackGoal`.
    """

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
        generator: torch.Generator | None = None,
        tick: Tick = no_tick,
    ) -> AttackResult:
        spec, classes = self.spec, labels[:, None]
        if self.target is not None:
            with torch.no_grad():
                classes = target_classes(self.target, ascent.logits(x), labels, generator=generator)

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
