"""Starts of attacks of one step, where the update makes the step itself (FGSM-PGI, LIET, GradAlign).

They are not in the methods' own files: a base class is imported at once, and `AttackResult` imports torch,
which the command line does without.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastdynat.attack_engine.attack_result import AttackResult
from fastdynat.attack_engine.engine import Attacker


@dataclass(frozen=True, kw_only=True)
class PriorStart(AttackResult):
    """The start of the attack, x0 in `x_adv`.

    Attributes:
        start: (N, C, H, W), x + d, not clipped to the image range.
        momentum: (N, C, H, W), m.
        attack: the attack of this batch, which has its radius and step size.
    """

    start: Tensor
    momentum: Tensor
    attack: Attacker


@dataclass(frozen=True, kw_only=True)
class LabelStart(AttackResult):
    """The start of the attack, x0 in `x_adv`.

    Attributes:
        start_targets, targets: (N, K) smoothed labels of the attack and of the update.
        attack: the attack of this batch, which has its radius and step size.
    """

    start_targets: Tensor
    targets: Tensor
    attack: Attacker


@dataclass(frozen=True, kw_only=True)
class TwoPoints(AttackResult):
    """Two points of the ball around each image, of which `x_adv` is the start of the attack.

    Attributes:
        other: (N, C, H, W), the point whose gradient is compared with that of the start.
        attack: the attack of this batch, which has its radius and step size.
    """

    other: Tensor
    attack: Attacker
