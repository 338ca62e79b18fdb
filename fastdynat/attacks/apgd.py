"""Auto-PGD (Croce & Hein 2020, arXiv 2003.01690): PGD with momentum and an adaptive step size."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdynat.attack_engine import apgd_steps as moves
from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.attack_result import AttackResult
from fastdynat.attack_engine.goal import wide
from fastdynat.attack_engine.lengths import per_image
from fastdynat.attack_engine.shrinking_batch import (
    Tick,
    allowed_halvings,
    iterate,
    no_tick,
    part,
    replace_rows,
)
from fastdynat.attacks.apgd_loss import APGDLoss, loss_and_grad
from fastdynat.attacks.registry import Radii, register
from fastdynat.errors import UserError, unknown_name
from fastdynat.ops.image_draws import Randomness
from fastdynat.ops.pgd_step_l2 import finite_gradient

# (gradient at the logits, (losses, logits)); named, because Dynamo traces no nested
# generic alias.
LogitGradAndLoss = tuple[Tensor, tuple[Tensor, Tensor]]
LARGER = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))  # radius in units of eps, share of the steps


@dataclass(frozen=True, kw_only=True)
class APGDResult(AttackResult):
    """Result of APGD: a misclassified iterate, or else the one with the highest loss.

    The first misclassified one, where a run ends; the last one, where runs go on (`APGD.goes_on`).
    `zero_grads` and `gradients` count the gradients at the starting points alone.

    Attributes:
        broken: (N,) bool: the attacked network misclassifies `x_adv`.
        loss: (N,) at `x_adv`, or where runs go on, the highest of the run; -inf for a misclassified clean
            image that was not attacked.
    """

    broken: Tensor
    loss: Tensor


@dataclass(frozen=True, kw_only=True)
class APGD:
    """Auto-PGD; the defaults are AutoAttack's.

    Attributes:
        loss: "ce", "dlr" (`AttackGoal`), or "dlr-t": `targeted_dlr` towards one class at a time.
        eps: radius of the ball in [0, 1] pixel units.
        norm: linf, l2 or l1.
        steps: steps per run.
        restarts: number of runs (for "dlr-t", per target class), each on the images that are still robust.
        targets: number of target classes of "dlr-t": those with the largest logits beside the label's.
        eot: gradients averaged per step, for randomised networks; above 1, a run goes on after its image is
            misclassified.
        rho: share of steps between two checkpoints that must raise the loss, else the step size is halved.
        larger_eps: start in balls of 3 and 2 eps, each for 30 % of the steps. For l1.
    """

    loss: APGDLoss
    eps: float
    norm: str = "linf"
    steps: int = 100
    restarts: int = 1
    targets: int = 9
    eot: int = 1
    rho: float = moves.RHO
    larger_eps: bool = False

    def __post_init__(self) -> None:
        if self.loss not in get_args(APGDLoss):
            raise unknown_name("loss of APGD", self.loss, get_args(APGDLoss))
        if self.norm not in moves.STEP:
            raise unknown_name("norm of APGD", self.norm, moves.STEP)
        if not 0 < self.eps < math.inf:
            raise UserError(f"eps must be above 0 pixel units, got {self.eps:g}; write 8/255")
        for name in ("steps", "restarts", "targets", "eot"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} of APGD must be >= 1, got {getattr(self, name)}")
        if self.larger_eps and (self.norm != "l1" or self.steps < 4):
            raise UserError(f"larger_eps is for l1 and 4 steps or more, got {self.norm} and {self.steps}")

    def __call__(
        self,
        ascent: Ascent,
        x: Tensor,
        labels: Tensor,
        *,
        generator: Randomness = None,
        tick: Tick = no_tick,
    ) -> APGDResult:
        return run_apgd(ascent, x, labels, self, generator=generator, tick=tick)

    def goes_on(self, ascent: Ascent) -> bool:
        """Every image runs all steps of a run, and its last misclassified iterate is returned.

        That is the authors' code. Ending at the first one comes to the same only where the attacked network
        always answers as it did, and where no other network judges.
        """
        return self.eot > 1 or not ascent.final

    def check_classes(self, classes: int) -> None:
        """Raise UserError where the loss is not defined for so few classes."""
        needed = {"ce": 2, "dlr": 3, "dlr-t": 4}[self.loss]
        if classes < needed:
            raise UserError(
                f"the loss {self.loss} needs {needed} classes, the network has {classes}; attack by apgd-ce "
                "instead"
            )

    def phases(self) -> list[tuple[float, int]]:
        """Radius and number of steps of each phase, in order."""
        if not self.larger_eps:
            return [(self.eps, self.steps)]
        counts = [math.ceil(share * self.steps) for _, share in LARGER[:-1]]
        return list(
            zip([factor * self.eps for factor, _ in LARGER], [*counts, self.steps - sum(counts)], strict=True)
        )


@dataclass(frozen=True)
class _Run:
    """State of one run; a row per image.

    Attributes:
        bounds: for linf, the lowest and highest pixels; the image itself twice for other norms.
        over: finished, or not to be attacked; its point is final.
        fell: misclassified at an iterate of the last phase.
        last_wrong: the last such iterate, where runs go on after it (`APGD.goes_on`); else None.
        best, best_grad, loss: the point with the highest loss, its gradient and loss; of an image whose run
            ended where it was misclassified, that point.
        last_loss: of the previous iterate.
        rises: steps since the last checkpoint that raised the loss.
        reduced, checked: whether the last checkpoint halved the step size, and the highest loss then.
        share, moved: for l1, the share of pixels that step, and the number moved at the last checkpoint.
    """

    x: Tensor
    labels: Tensor
    target: Tensor
    low: Tensor
    high: Tensor
    x_adv: Tensor
    x_old: Tensor
    grad: Tensor
    best: Tensor
    best_grad: Tensor
    loss: Tensor
    last_loss: Tensor
    rises: Tensor
    reduced: Tensor
    checked: Tensor
    size: Tensor
    share: Tensor
    moved: Tensor
    over: Tensor
    fell: Tensor
    last_wrong: Tensor | None
    zero: Tensor

    def found(self) -> Tensor:
        """The point that the run returns for each image."""
        fell = per_image(self.fell, self.x)
        return self.best if self.last_wrong is None else torch.where(fell, self.last_wrong, self.best)


def run_apgd(
    ascent: Ascent,
    x: Tensor,
    labels: Tensor,
    spec: APGD,
    *,
    x_starts: Sequence[Tensor] | None = None,
    generator: Randomness = None,
    tick: Tick = no_tick,
) -> APGDResult:
    """Attack images `x` (N, C, H, W) on a network in eval mode; the caller sets modes and grad mode.

    x_starts: starting points of the runs, each like `x`; None draws them.
    """
    with torch.no_grad():
        logits = wide(ascent.logits(ascent.to_model_input(x)))
    targets = _targets(logits, labels, spec)
    broken, best = ascent.settle_ties(x, logits, labels), x.clone()
    if spec.goes_on(ascent):  # another answer may be right about the clean image
        broken = torch.zeros_like(broken)
    loss = torch.full_like(logits[:, 0], -math.inf)
    zero_grads, gradients = torch.zeros((), dtype=torch.int64, device=x.device), 0
    runs = len(targets) * spec.restarts
    for run in range(runs):
        standing = len(x) - int(broken.sum())
        if standing == 0:
            break
        target = targets[run // spec.restarts]
        start = None if x_starts is None else x_starts[run]
        end = _one_run(ascent, x, labels, target, spec, broken, start, generator, part(tick, run, runs))
        zero_grads, gradients = zero_grads + (end.zero & ~broken).sum(), gradients + standing
        better = ~broken & (end.fell | (end.loss > loss))
        best, loss = replace_rows(best, better, end.found()), torch.where(better, end.loss, loss)
        broken = broken | end.fell
    if spec.loss == "ce":
        loss = torch.where(loss == -math.inf, loss, F.softplus(loss, threshold=80))
    return APGDResult(best, zero_grads, gradients, broken=broken, loss=loss)


def _targets(logits: Tensor, labels: Tensor, spec: APGD) -> list[Tensor]:
    """The target class of each run; the labels, unused, for an untargeted loss."""
    classes = logits.shape[1]
    spec.check_classes(classes)
    if spec.loss != "dlr-t":
        return [labels]
    # Without the label, which is not the largest logit of an image that a replica's rounding misclassifies.
    others = logits.scatter(1, labels[:, None], -math.inf).argsort(1, descending=True)
    return [others[:, rank] for rank in range(min(spec.targets, classes - 1))]


def _one_run(
    ascent: Ascent,
    x: Tensor,
    labels: Tensor,
    target: Tensor,
    spec: APGD,
    over: Tensor,
    start: Tensor | None,
    generator: Randomness,
    tick: Tick,
) -> _Run:
    """All phases of one run on the images that are not `over`."""
    phases, done = spec.phases(), 0
    z = moves.start(x, spec.norm, phases[0][0], generator) if start is None else start
    for eps, steps in phases:
        z = moves.project_on_l1_ball(z, x, eps) if spec.larger_eps else z.clamp(0, 1)
        state = _begin(x, labels, target, z, spec, eps, over, goes_on=spec.goes_on(ascent))
        # On a GPU, checking for finished images waits for the device.
        pace = {"every": 10 if x.is_cuda else 1, "max_halvings": allowed_halvings(ascent.max_halvings, x)}

        def told(share: float, done: int = done, steps: int = steps) -> None:
            tick((done + share * steps) / spec.steps)

        step = _stepper(ascent, spec, eps, steps, last=eps == phases[-1][0])
        state = iterate(state, step, steps + 1, done=lambda s: s.over, tick=told, **pace)
        z, done = state.best, done + steps
    return state


def _begin(
    x: Tensor,
    labels: Tensor,
    target: Tensor,
    z: Tensor,
    spec: APGD,
    eps: float,
    over: Tensor,
    *,
    goes_on: bool,
) -> _Run:
    low, high = ((x - eps).clamp_(min=0), (x + eps).clamp_(max=1)) if spec.norm == "linf" else (x, x)
    zero = torch.zeros(
        len(x), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device
    )
    pixels = x[0].numel()
    moved = moves.changed(z, x) if spec.larger_eps else torch.full_like(labels, pixels)
    return _Run(
        x=x,
        labels=labels,
        target=target,
        low=low,
        high=high,
        x_adv=z,
        x_old=z,
        grad=torch.zeros_like(x),
        best=z.clone(),
        best_grad=torch.zeros_like(x),
        loss=zero - math.inf,
        # As in the authors' code, the first step's DLR loss is compared with 0.
        last_loss=zero - math.inf if spec.loss == "ce" else zero,
        rises=torch.zeros_like(labels),
        reduced=torch.ones_like(over),
        checked=zero,
        size=zero + moves.STEP[spec.norm] * eps,
        share=moved.to(zero) / pixels / 1.5 if spec.larger_eps else zero + 0.2,
        moved=moved,
        over=over,
        fell=torch.zeros_like(over),
        last_wrong=z.clone() if goes_on else None,
        zero=torch.zeros_like(over),
    )


def _stepper(
    ascent: Ascent, spec: APGD, eps: float, steps: int, *, last: bool
) -> Callable[[_Run, int], _Run]:
    """Step 0 evaluates the start; each other step moves, evaluates, and reviews the step size when due.

    last: this is the last phase; an image that is misclassified in it falls, and is finished unless runs go
        on.
    """
    reviews = moves.checkpoints(steps, spec.norm)
    # Neither radius nor number of steps is part of what is compiled.
    look = ascent.compiled(partial(_look, spec=spec), key=("apgd", spec.loss, spec.eot))

    def step(s: _Run, i: int) -> _Run:
        x_adv = s.x_adv
        if i > 0:
            x_old = s.x_old if i > 1 else None
            x_adv = moves.moved(spec.norm, s.x_adv, x_old, s.grad, s.size, s.share, s.x, s.low, s.high, eps)
        grad, loss, logits = look(x_adv, s.labels, s.target)
        loss = loss.to(s.loss)  # of a network in half precision, float32 at float64 images
        wrong = ascent.settle_ties(x_adv, logits, s.labels)
        if i == 0:
            s = replace(s, checked=loss, zero=~grad.flatten(1).any(1))
        falls = wrong & ~s.over & last
        ends = falls if s.last_wrong is None else torch.zeros_like(falls)
        better = ~s.over & ((loss > s.loss) | ends)
        s = replace(
            s,
            x_old=s.x_adv,
            x_adv=x_adv,
            grad=grad,
            best=replace_rows(s.best, better, x_adv),
            best_grad=replace_rows(s.best_grad, better, grad),
            loss=torch.where(better, loss, s.loss),
            rises=s.rises + (loss > s.last_loss) if i else s.rises,
            last_loss=loss if i else s.last_loss,
            over=s.over | ends,
            fell=s.fell | falls,
            last_wrong=None if s.last_wrong is None else replace_rows(s.last_wrong, falls, x_adv),
        )
        return _review(s, spec, eps, reviews[i]) if i in reviews else s

    return step


def _look(
    ascent: Ascent, x_adv: Tensor, labels: Tensor, target: Tensor, *, spec: APGD
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient, the loss and the logits (of several outputs, the last one's) at `x_adv`."""

    # Draws of one image that were rescaled apart would not add up; in half precision they would be lost
    # without.
    rescale = ascent.underflow.rescale and (spec.eot == 1 or ascent.dtype is not None)

    def logit_grad(logits: Tensor) -> LogitGradAndLoss:
        loss, weights = loss_and_grad(spec.loss, wide(logits), labels, target, rescale=rescale)
        return (weights * ascent.underflow.loss_scale).to(logits.dtype), (loss, logits)

    (loss, logits), grad = ascent.value_and_grad(ascent.to_model_input(x_adv), logit_grad)
    # Of each draw: one that is not finite would spoil the sum.
    grad = finite_gradient(grad, x_adv.dtype)
    for _ in range(spec.eot - 1):
        (loss, logits), more = ascent.value_and_grad(ascent.to_model_input(x_adv), logit_grad)
        grad = finite_gradient(grad + finite_gradient(more, x_adv.dtype), x_adv.dtype)
    return grad, loss, logits


def _review(s: _Run, spec: APGD, eps: float, back: int) -> _Run:
    """Halve the step size and go back to the best point where the loss stalls; for l1, see `_review_l1`."""
    if spec.norm == "l1":
        return _review_l1(s, eps)
    halve = moves.stalls(s.rises, back, s.reduced, s.checked, s.loss, spec.rho)
    return replace(
        _back_to_best(s, halve),
        size=torch.where(halve, s.size / 2, s.size),
        reduced=halve,
        checked=s.loss,
        rises=torch.zeros_like(s.rises),
    )


def _review_l1(s: _Run, eps: float) -> _Run:
    moved = moves.changed(s.best, s.x)
    size, sparser = moves.l1_review(s.size, moved, s.moved, moves.STEP["l1"] * eps)
    share = moved.to(size) / s.x[0].numel() / 1.5
    return replace(_back_to_best(s, sparser), size=size, share=share, moved=moved)


def _back_to_best(s: _Run, rows: Tensor) -> _Run:
    return replace(s, x_adv=replace_rows(s.x_adv, rows, s.best), grad=replace_rows(s.grad, rows, s.best_grad))


@register(
    r"apgd-(?P<loss>ce|dlr|t)(?P<steps>\d+)?(?:-(?P<restarts>\d+))?",
    help={
        "apgd-ce": "APGD on the cross-entropy (Croce & Hein 2020), 100 steps; apgd-ceK, apgd-ceK-R",
        "apgd-dlr": "APGD on the difference of logits ratio",
        "apgd-t": "APGD on the targeted difference of logits ratio, towards nine classes",
    },
    norms=("linf", "l2", "l1"),
)
def apgd_attack(match: re.Match[str], radii: Radii) -> APGD:
    """APGD with AutoAttack's numbers."""
    losses: dict[str, APGDLoss] = {"ce": "ce", "dlr": "dlr", "t": "dlr-t"}
    l1 = radii.norm == "l1"
    return APGD(
        loss=losses[match["loss"]],
        eps=radii.eps,
        norm=radii.norm,
        steps=int(match["steps"] or 100),
        restarts=int(match["restarts"] or 1),
        targets=5 if l1 else 9,
        larger_eps=l1,
    )
