"""Shared parts of the minimum-norm attacks."""

import torch
from torch import Tensor

from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.goal import AttackGoal, GoalKind, wide
from fastdynat.attack_engine.lengths import bounded_gradient
from fastdynat.attacks.interface import Nearest
from fastdynat.ops.attack_logit_grad import inverse_power_of_two

USUAL = 2.0**20  # logits that spread by less, and by more than its inverse, are not scaled


def margin_goal(labels: Tensor, targeted: bool = False) -> AttackGoal:
    """The margin away from `labels` (N,), or towards them; positive exactly where the goal is reached."""
    return AttackGoal("margin", labels, targeted)


def score(ascent: Ascent, x: Tensor, goal: AttackGoal) -> Tensor:
    """The goal's value per image (N,)."""
    with torch.no_grad():
        return goal.per_image(ascent.logits(ascent.to_model_input(x)))


def logit_unit(ascent: Ascent, x: Tensor) -> Tensor:
    """(N,) powers of two that scale margins before they are weighted against distances in pixels.

    1 for usual logits; others are brought to order one, because an attack whose weights start at the same
    number for all networks would see only the distance, or only the margin.
    """
    with torch.no_grad():
        logits = wide(ascent.logits(ascent.to_model_input(x)))
    spread = logits.amax(1) - logits.amin(1)
    return torch.where((spread > 1 / USUAL) & (spread < USUAL), 1.0, inverse_power_of_two(spread)).to(x.dtype)


def hinge_and_grad(
    ascent: Ascent, model_input: Tensor, target: Tensor, *, kind: GoalKind, kappa: float
) -> tuple[Tensor, Tensor]:
    """The goal's value (N,), and the gradient of ``max(kappa - value, 0)`` at `model_input`.

    The gradient has the network's own size, but for entries that are not finite (`bounded_gradient`): a small
    weight c would bring half precision nearer to underflow.
    """
    goal = AttackGoal.from_kind(kind, target)

    def logit_grad(logits: Tensor) -> tuple[Tensor, Tensor]:
        value = goal.per_image(logits)
        return -goal.logit_grad(logits) * (value < kappa)[:, None], value

    value, grad = ascent.value_and_grad(model_input, logit_grad)
    return value, bounded_gradient(grad)


def result(
    x: Tensor, x_adv: Tensor, found: Tensor, distance: Tensor, *, eps: float, zeros: Tensor, asked: Tensor
) -> Nearest:
    """The `Nearest` of an attack; where nothing was found, `x_adv` is the image.

    zeros, asked: (N,) int64, number of each image's gradients that were zero in every pixel, and of all.
    """
    return Nearest(
        torch.where(found.view(-1, 1, 1, 1), x_adv, x),
        zeros.sum(),
        int(asked.sum()),
        found=found,
        distance=torch.where(found, distance, float("inf")),
        eps=eps,
    )
