"""Shared parts of the minimum-norm attacks."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fastdynat.attack_engine.ascent import Ascent, nearly_ties
from fastdynat.attack_engine.goal import AttackGoal, GoalKind, wide
from fastdynat.attack_engine.lengths import bounded_gradient
from fastdynat.attacks.interface import Nearest
from fastdynat.models.logits import predicted_classes
from fastdynat.ops.attack_logit_grad import inverse_power_of_two

USUAL = 2.0**20  # logits that spread by less, and by more than its inverse, are not scaled
LEAST = torch.finfo(torch.float32).tiny  # size of a verdict whose margin has no sign


def margin_goal(labels: Tensor, targeted: bool = False) -> AttackGoal:
    """The margin away from `labels` (N,), or towards them; `verdict` gives its value."""
    return AttackGoal("margin", labels, targeted)


def verdict(goal: AttackGoal, logits: Tensor) -> Tensor:
    """The value (N,) of the margin `goal`: above 0 where the predicted class reaches it, else below.

    The margin of two largest logits that are equal, as they often are in half precision, is 0, whichever of
    the two classes is predicted; that of NaN, which is never right (`predicted_classes`), has no sign.
    """
    value, classes = goal.per_image(logits), predicted_classes(logits)
    reached = classes == goal.target if goal.targeted else classes != goal.target
    agrees = torch.where(reached, value > 0, value < 0)
    return torch.where(agrees, value, torch.where(reached, LEAST, -LEAST).to(value.dtype))


def score(ascent: Ascent, x: Tensor, goal: AttackGoal, asked: Tensor | bool = True) -> Tensor:
    """The `verdict` per image (N,) on `x`; see `settled`."""
    with torch.no_grad():
        logits = ascent.logits(ascent.to_model_input(x))
        return settled(ascent, x, goal, verdict(goal, logits), nearly_ties(logits, goal.target), asked)


def settled(
    ascent: Ascent, x: Tensor, goal: AttackGoal, value: Tensor, near: Tensor, asked: Tensor | bool
) -> Tensor:
    """`value` (N,), a `verdict` on `x`, of the network itself where the replica's may mislead.

    As `Ascent.settle_ties`: a point that only the replica misclassifies must not end a search.

    near: (N,) bool, where the replica's logits nearly tie (`nearly_ties`).
    asked: (N,) bool, images whose search goes on; True is all.
    """
    if ascent.judge is None or (x.is_cuda and not ascent.strict):
        return value
    doubtful = near | (value > 0) if ascent.strict else near
    rows = (doubtful & asked).nonzero().squeeze(1)
    if len(rows) == 0:
        return value
    with torch.no_grad():
        own = verdict(replace(goal, target=goal.target[rows]), ascent.judge(x[rows]))
    return value.index_copy(0, rows, own.to(value.dtype))


def logit_unit(ascent: Ascent, x: Tensor) -> Tensor:
    """(N,) powers of two that scale margins before they are weighted against distances in pixels.

    1 for usual logits; others are brought to order one, because an attack whose weights start at the same
    number for all networks would see only the distance, or only the margin.
    """
    with torch.no_grad():
        logits = wide(ascent.logits(ascent.to_model_input(x)))
    spread = logits.amax(1) - logits.amin(1)
    return torch.where((spread > 1 / USUAL) & (spread < USUAL), 1.0, inverse_power_of_two(spread)).to(x.dtype)


def descent(ascent: Ascent, kind: GoalKind) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A function (x, target, asked) -> the `verdict` (N,) of the margin goal of `kind`, minus its gradient.

    Both are in the dtype of `x`, where the images `asked` (N,) bool are `settled`.
    """
    look = ascent.compiled(partial(_look, kind=kind), key=("descent", kind), names=("margin", "", "gradient"))

    def at(x: Tensor, target: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        value, near, grad = look(ascent.to_model_input(x), target)
        value = settled(ascent, x, AttackGoal.from_kind(kind, target), value, near, asked)
        return value.to(x.dtype), grad.to(x.dtype)

    return at


def _look(
    ascent: Ascent, model_input: Tensor, target: Tensor, *, kind: GoalKind
) -> tuple[Tensor, Tensor, Tensor]:
    """The `verdict` (N,), `nearly_ties` (N,), and the gradient of minus the goal's value at `model_input`.

    The gradient has the network's own size, but for entries that are not finite (`bounded_gradient`): a small
    weight c would bring half precision nearer to underflow.
    """
    goal = AttackGoal.from_kind(kind, target)

    def logit_grad(logits: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return -goal.logit_grad(logits), (verdict(goal, logits), nearly_ties(logits, target))

    (value, near), grad = ascent.value_and_grad(model_input, logit_grad)
    return value, near, bounded_gradient(grad)


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
