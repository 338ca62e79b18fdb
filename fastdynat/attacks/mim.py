"""The momentum iterative method (Dong et al. 2018, arXiv 1710.06081): ``mimK``."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.attack_result import AttackResult
from fastdynat.attack_engine.goal import AttackGoal, GoalKind
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attack_engine.shrinking_batch import Tick
from fastdynat.attack_engine.steps import pgd_step
from fastdynat.attacks.registry import Radii, register
from fastdynat.attacks.restarted_pgd import RestartedPGD, from_match


@dataclass(frozen=True)
class MIM(RestartedPGD):
    """PGD whose steps follow ``v <- decay v + g / mean|g|`` in place of the gradient g; v is 0 at the start.

    The mean is over an image's entries; the paper's sum gives the same steps, because only the direction of v
    matters.
    """

    decay: float = 1.0

    def climb(self, ascent: Ascent, x: Tensor, goal: AttackGoal, x_start: Tensor, tick: Tick) -> AttackResult:
        step = _step(ascent, goal.kind, self.spec, self.decay)
        x_adv, read, velocity = x_start, ascent.to_model_input(x_start), torch.zeros_like(x)
        zero_grads = torch.zeros((), dtype=torch.int64, device=x.device)
        for i in range(self.spec.steps):
            tick(i / self.spec.steps)
            x_adv, read, velocity, zeros = step(x_adv, read, velocity, x, goal.target)
            zero_grads = zero_grads + zeros
        return AttackResult(x_adv.detach(), zero_grads, len(x) * self.spec.steps)


def _step(ascent: Ascent, kind: GoalKind, spec: PGDSpec, decay: float) -> Callable[..., tuple[Tensor, ...]]:
    goal_gradient = ascent.goal_gradient(kind)

    def step(x_adv: Tensor, read: Tensor, velocity: Tensor, x: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        grad = goal_gradient(read, target).gradient
        # An entry that is not finite would stay in the velocity.
        g = grad.to(x.dtype).nan_to_num(0.0, 0.0, 0.0)
        mean = g.abs().mean((1, 2, 3), keepdim=True)
        velocity = decay * velocity + g / torch.where(mean > 0, mean, 1.0)
        new = pgd_step(
            x_adv, velocity, x, norm=spec.norm, step_size=spec.step_size, eps=spec.eps, low_dtype=ascent.dtype
        )
        return new.x_adv, new.x_adv if new.low is None else new.low, velocity, (mean == 0).sum()

    return step


@register(
    r"mim(?P<steps>\d+)?(?:-k(?P<confidence>\d+(?:\.\d+)?))?(?:-(?P<restarts>\d+))?(?:@(?P<target>\w*))?",
    help={
        "mim": "mimK, K = 10 unless given: bim with momentum 1 on g / mean|g| (Dong et al. 2018); linf, l2"
    },
    norms=("linf", "l2"),  # those of the paper
    half_precision=True,
)
def mim_attack(match: re.Match[str], radii: Radii) -> RestartedPGD:
    """MIM on the cross-entropy from the image."""
    return from_match(match, radii, start="none", steps=10, kind=MIM)
