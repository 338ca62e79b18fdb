"""Auto-PGD as the attack of training: fixed work per batch, without waiting for the device.

APGD of Croce & Hein 2020 (arXiv 2003.01690; L1: 2021, arXiv 2103.01208) in the form in which Croce & Hein
2022 (arXiv 2105.12508) and Singh et al. 2023 (arXiv 2303.01870, 2 steps) train. It starts at the image
itself, takes n gradients and n + 1 losses, and returns of all n + 1 points the one with the highest loss,
misclassified or not. `fastdynat.attacks.apgd`, the attack of evaluations, starts at random and stops at
misclassified images.

As published, the first step counts as a rise of the loss. Losses are compared by `AttackGoal.order`, which
does not round to 0 as the cross-entropy of a confident network does.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastdynat.attack_engine import apgd_steps as moves
from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.attack_result import AttackResult
from fastdynat.attack_engine.goal import AttackGoal, GoalKind
from fastdynat.attack_engine.lengths import per_image
from fastdynat.attack_engine.pgd_spec import PGDSpec, sizes_of
from fastdynat.ops import Size
from fastdynat.ops.pgd_step_l2 import finite_gradient

L1_SHARE = 0.05  # of the entries that the first step of l1 moves; evaluations take 0.2


class PointOfGoal(NamedTuple):
    """An attack goal at one point.

    Attributes:
        gradient: (N, C, H, W) in the dtype of the model input, up to one positive factor per image.
        order: (N,) `AttackGoal.order`.
        satisfied: (N,) bool, `AttackGoal.satisfied`; None where no image ever is.
        kept: (N,) bool, the network still predicts the goal's class; None unless `AttackGoal.track`.
    """

    gradient: Tensor
    order: Tensor
    satisfied: Tensor | None
    kept: Tensor | None


def point_of_goal(ascent: Ascent, model_input: Tensor, target: Tensor, *, kind: GoalKind) -> PointOfGoal:
    """The goal of `kind` with `target` at `model_input`: one forward and one backward pass."""
    goal = AttackGoal.from_kind(kind, target)
    logits, gradient = ascent.logits_and_grad(model_input, goal)
    satisfied = None if goal.open_ended else goal.satisfied(logits)
    return PointOfGoal(gradient, goal.order(logits), satisfied, ~goal.reached(logits) if goal.track else None)


def order_of_goal(ascent: Ascent, model_input: Tensor, target: Tensor, *, kind: GoalKind) -> Tensor:
    """`AttackGoal.order` at `model_input`, (N,): one forward pass."""
    return AttackGoal.from_kind(kind, target).order(ascent.logits(model_input))


def adaptive_ascend(
    ascent: Ascent,
    x: Tensor,
    goal: AttackGoal,
    spec: PGDSpec,
    *,
    x_start: Tensor,
    sizes: Tensor | None = None,
) -> AttackResult:
    """`spec.steps` steps of APGD from `x_start`, which is brought into the ball first.

    `spec.step_size` is not used: steps begin with 2 eps (eps under l1) and are reviewed at
    `apgd_steps.checkpoints`. The caller sets train/eval and grad modes. sizes: as in `run_pgd`.
    """
    climb = _Climb(ascent, x, goal, spec, x_start, sizes_of(spec, sizes)[0])
    for step in range(1, spec.steps + 1):
        climb.step(step)
    gradients = len(x) * spec.steps
    return AttackResult(climb.best, climb.zero_grads, gradients, climb.kept, steps=spec.steps)


class _Climb:
    """State of one attack; a row per image. Every step does the same work for any images.

    Attributes:
        best, best_gradient, best_order: the point with the highest loss so far.
        rises: steps since the last review that raised the loss.
        reduced, checked: whether the last review halved the step size, and `best_order` then.
        share, changed: for l1, the share of entries that step, and the number moved at the last review.
    """

    def __init__(
        self, ascent: Ascent, x: Tensor, goal: AttackGoal, spec: PGDSpec, x_start: Tensor, eps: Size
    ) -> None:
        self._ascent, self._x, self._goal, self._spec, self._eps = ascent, x, goal, spec, eps
        self._reviews = moves.checkpoints(spec.steps, spec.norm)
        names = PointOfGoal._fields
        self._look = ascent.compiled(
            partial(point_of_goal, kind=goal.kind), key=("apgd", goal.kind), names=names
        )
        self._last = ascent.compiled(partial(order_of_goal, kind=goal.kind), key=("apgd order", goal.kind))
        self._bounds = ((x - eps).clamp_(min=0), (x + eps).clamp_(max=1))
        self.zero_grads = torch.zeros((), dtype=torch.int64, device=x.device)
        self.kept = torch.zeros(len(x), dtype=torch.int64, device=x.device) if goal.track else None
        self.point = self.before = self.best = self._into_ball(x_start)
        if spec.steps > 0:
            self._begin()

    def _into_ball(self, z: Tensor) -> Tensor:
        spec = self._spec
        if spec.norm == "linf":
            return torch.clamp(z, *self._bounds)
        project = moves.project_l2 if spec.norm == "l2" else moves.project_on_l1_ball
        return project(z, self._x, self._eps)

    def _begin(self) -> None:
        entries, rows = self._x[:1].numel(), len(self._x)
        self.gradient, order = self._looked()
        self.best_gradient, self.best_order = self.gradient, order
        self.last_order = torch.full_like(order, -torch.inf)
        self.checked = order
        self.rises = torch.zeros(rows, dtype=torch.int64, device=order.device)
        self.reduced = torch.ones(rows, dtype=torch.bool, device=order.device)
        self.changed = torch.full_like(self.rises, entries)
        self.share = torch.full((rows,), L1_SHARE, device=self._x.device)
        self.size = self._x.new_full((rows,), moves.STEP[self._spec.norm]) * self._eps

    def _looked(self) -> tuple[Tensor, Tensor]:
        """Gradient and order at `point`; counts zero gradients and images whose class the network keeps."""
        found = self._look(self._ascent.to_model_input(self.point), self._goal.target)
        gradient = finite_gradient(found.gradient, self._x.dtype)
        done = gradient.abs().flatten(1).amax(1) > 0
        done = done if found.satisfied is None else done | found.satisfied
        self.zero_grads = self.zero_grads + (~done).sum()
        if self.kept is not None:
            self.kept = self.kept + found.kept
        return gradient, _comparable(found.order)

    def step(self, number: int) -> None:
        """Step `number`, counted from 1: move, look, and review the step size when that is due."""
        before = self.before if number > 1 else None
        norm, eps = self._spec.norm, self._eps
        new = moves.moved(
            norm, self.point, before, self.gradient, self.size, self.share, self._x, *self._bounds, eps
        )
        self.before, self.point = self.point, new
        if number == self._spec.steps:  # nothing follows its gradient
            with torch.no_grad():
                order = self._last(self._ascent.to_model_input(new), self._goal.target)
            self.best = _chosen(_comparable(order) > self.best_order, new, self.best)
            return
        self.gradient, order = self._looked()
        self.rises = self.rises + (order > self.last_order)
        self.last_order = order
        better = order > self.best_order
        self.best = _chosen(better, new, self.best)
        self.best_gradient = _chosen(better, self.gradient, self.best_gradient)
        self.best_order = torch.where(better, order, self.best_order)
        if number in self._reviews:
            self._review(self._reviews[number])

    def _review(self, back: int) -> None:
        if self._spec.norm == "l1":
            now, full = moves.changed(self.best, self._x), moves.STEP["l1"] * self._eps
            self.size, again = moves.l1_review(self.size, now, self.changed, full)
            self.share, self.changed = now / self._x[:1].numel() / 1.5, now
        else:
            again = moves.stalls(self.rises, back, self.reduced, self.checked, self.best_order)
            self.size = torch.where(again, self.size / 2, self.size)
            self.reduced, self.checked, self.rises = again, self.best_order, torch.zeros_like(self.rises)
        self.point = _chosen(again, self.best, self.point)
        self.gradient = _chosen(again, self.best_gradient, self.gradient)


def _comparable(order: Tensor) -> Tensor:
    """`order` with -inf for NaN, so that any number is better."""
    return torch.where(order.isnan(), -torch.inf, order)


def _chosen(rows: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.where(per_image(rows, one), one, other)
