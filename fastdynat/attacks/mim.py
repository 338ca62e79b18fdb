"""The momentum iterative method (Dong et al. 2018, arXiv 1710.06081)."""

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
from fastdynat.attacks.ball_attacks import PGD

NORMS = ("linf", "l2")  # those of the paper


@dataclass(frozen=True)
class MIM(PGD):
    """PGD whose steps follow ``v <- decay v + g / mean|g|`` in place of the gradient g, v = 0 before the
    first.

    The mean is over an image's entries; the paper's sum gives the same steps, because v is only followed in
    direction.
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
        g = grad.to(x.dtype).nan_to_num(0.0, 0.0, 0.0)  # one that is not finite would stay in the velocity
        mean = g.abs().mean((1, 2, 3), keepdim=True)
        velocity = decay * velocity + g / torch.where(mean > 0, mean, 1.0)
        new = pgd_step(
            x_adv, velocity, x, norm=spec.norm, step_size=spec.step_size, eps=spec.eps, low_dtype=ascent.dtype
        )
        return new.x_adv, new.x_adv if new.low is None else new.low, velocity, (mean == 0).sum()

    return step
