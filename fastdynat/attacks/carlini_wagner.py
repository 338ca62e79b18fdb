"""The L2 attack of Carlini & Wagner 2017 (arXiv 1608.04644), with a search for c per image: ``cwl2``."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.lengths import length, per_image
from fastdynat.attack_engine.shrinking_batch import Tick, allowed_halvings, iterate, no_tick
from fastdynat.attacks.interface import Nearest
from fastdynat.attacks.nearest import descent, logit_unit, margin_goal, result, score
from fastdynat.attacks.per_image_adam import adam_
from fastdynat.attacks.registry import Radii, register
from fastdynat.errors import UserError
from fastdynat.ops.image_draws import Randomness

CHECKS = 10  # of the loss in a run
LEAST_PROGRESS = 0.9999  # a run ends where the loss is above this share of the last check's
INSIDE = 0.999999  # keeps pixels of 0 and 1 at a finite place in tanh space


@dataclass(frozen=True)
class _State:
    """A row per image. `w` and Adam's moments are written in place."""

    start: Tensor  # the image in tanh space
    # The image back from tanh space: rounding on the way would be a first gradient, which Adam would blow up.
    x: Tensor
    target: Tensor
    w: Tensor  # the iterate is (tanh w + 1) / 2
    mean: Tensor
    square: Tensor
    nearest: Tensor
    squared: Tensor  # distance of `nearest`, squared; infinite: none
    unit: Tensor  # of margins, `logit_unit`
    c: Tensor
    lower: Tensor
    upper: Tensor
    left: Tensor  # runs to go, this one included
    taken: Tensor  # steps of this run
    hit: Tensor  # this run was adversarial
    loss: Tensor
    looked: Tensor  # the loss at the last check
    asked: Tensor
    zeros: Tensor


@dataclass(frozen=True, kw_only=True)
class CarliniL2:
    """Minimises ``||x_adv - x||^2 + c max(kappa - margin, 0)`` over w, ``x_adv = (tanh w + 1) / 2``, by Adam.

    Starts at the image and returns the nearest adversarial iterate of all runs. Each image has its own c,
    found by a search over `binary_steps` runs: c is multiplied by 10 until a run is adversarial, then the
    interval is halved. A run ends early when its loss has not fallen over a tenth of its steps; the image's
    next run then begins in the same batch, and images leave the batch after their last run. Clean images that
    are misclassified are returned at distance 0. Margins of logits that spread by more than 2^20 or less than
    2^-20 are scaled to order one, so that the search for c reaches them.

    With ``binary_steps=1, c=1, steps=50`` these are torchattacks' settings.

    Attributes:
        binary_steps: runs per image; 1 is a fixed c.
        steps: of Adam per run, a multiple of 10. The paper's code has up to 10,000.
        c: weight c in the first run.
        lr: Adam's step size.
        kappa: the margin that an adversarial image must exceed.
        abort: let runs end early.
        eps: radius of the L2 ball in which robustness is judged (`Nearest.eps`).
    """

    binary_steps: int = 9
    steps: int = 1000
    c: float = 1e-3
    lr: float = 0.01
    kappa: float = 0.0
    abort: bool = True
    eps: float = float("inf")

    def __post_init__(self) -> None:
        if self.binary_steps < 1:
            raise UserError(f"C&W needs binary_steps >= 1, got {self.binary_steps}")
        if self.steps < CHECKS or self.steps % CHECKS:
            raise UserError(
                f"C&W checks its loss {CHECKS} times: steps must be a multiple of that, got {self.steps}"
            )
        for name in ("c", "lr"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} of C&W must be above 0, got {getattr(self, name):g}")
        if not 0 <= self.kappa < float("inf"):
            raise UserError(f"kappa of C&W must be >= 0, got {self.kappa:g}")

    @property
    def norm(self) -> str:
        return "l2"

    def __call__(
        self,
        ascent: Ascent,
        x: Tensor,
        labels: Tensor,
        *,
        generator: Randomness = None,
        tick: Tick = no_tick,
    ) -> Nearest:
        return self.run(ascent, x, margin_goal(labels), tick=tick)

    def run(self, ascent: Ascent, x: Tensor, goal: AttackGoal, *, tick: Tick = no_tick) -> Nearest:
        """Attack `x` (N, C, H, W) for `goal`, a "margin" one, which may be targeted."""
        already = score(ascent, x, goal) > 0
        every = self.steps // CHECKS
        down = descent(ascent, goal.kind)

        def step(s: _State, i: int) -> _State:
            s = self._step(s, down)
            return self._turn_over(s) if (i + 1) % every == 0 else s

        end = iterate(
            self._begin(x, goal.target, already, logit_unit(ascent, x)),
            step,
            self.binary_steps * self.steps,
            done=lambda s: s.left == 0,
            every=every,
            max_halvings=allowed_halvings(ascent.max_halvings, x),
            tick=tick,
        )
        distance = length(end.nearest - x, "l2")
        return result(
            x,
            end.nearest,
            already | end.squared.isfinite(),
            distance,
            eps=self.eps,
            zeros=end.zeros,
            asked=end.asked,
        )

    def _begin(self, x: Tensor, target: Tensor, already: Tensor, unit: Tensor) -> _State:
        start = (2 * x - 1).clamp(-INSIDE, INSIDE).atanh()
        none = torch.zeros_like(already, dtype=torch.int64)
        number, endless = torch.zeros_like(x[:, 0, 0, 0]), torch.full_like(x[:, 0, 0, 0], float("inf"))
        return _State(
            start=start,
            x=_to_image(start.tanh()),
            target=target,
            w=start.clone(),
            mean=torch.zeros_like(x),
            square=torch.zeros_like(x),
            nearest=x.clone(),
            squared=endless,
            unit=unit,
            c=number + self.c,
            lower=number,
            upper=endless,
            left=torch.where(already, 0, self.binary_steps),
            taken=none,
            hit=torch.zeros_like(already),
            loss=number,
            looked=endless,
            asked=none,
            zeros=none,
        )

    def _step(self, s: _State, down: Callable[..., tuple[Tensor, Tensor]]) -> _State:
        tanh = s.w.tanh()
        x_adv = _to_image(tanh)
        running = s.left > 0
        margin, grad = down(x_adv, s.target, running)
        adversarial = margin > self.kappa
        zeros = (length(grad, "linf") == 0) & (margin < self.kappa) & running
        moved = x_adv - s.x
        squared = length(moved, "l2").square()
        closer = adversarial & (squared < s.squared) & running
        torch.where(per_image(closer, s.x), x_adv, s.nearest, out=s.nearest)
        # The gradient in w: (2 moved + c grad) (1 - tanh^2) / 2, computed in place; of the hinge, where it is
        # not 0.
        grad.mul_(per_image(s.c * s.unit / 2 * (margin < self.kappa), s.x)).add_(moved)
        grad.addcmul_(torch.mul(grad, tanh, out=moved), tanh, value=-1)
        taken = s.taken + 1
        adam_(s.w, s.mean, s.square, grad, lr=self.lr, taken=taken)
        return replace(
            s,
            squared=torch.where(closer, squared, s.squared),
            taken=taken,
            hit=s.hit | adversarial,
            loss=squared + s.c * s.unit * (self.kappa - margin).clamp_min(0),
            asked=s.asked + running,
            zeros=s.zeros + zeros,
        )

    def _turn_over(self, s: _State) -> _State:
        """After each tenth: images whose run is over get their next c and start again."""
        over = s.taken >= self.steps
        if self.abort:
            over = over | (s.loss > LEAST_PROGRESS * s.looked)
        upper = torch.where(over & s.hit, torch.minimum(s.upper, s.c), s.upper)
        lower = torch.where(over & ~s.hit, torch.maximum(s.lower, s.c), s.lower)
        following = torch.where(upper.isfinite(), (lower + upper) / 2, 10 * s.c)
        again = per_image(over, s.x)
        return replace(
            s,
            w=torch.where(again, s.start, s.w),
            mean=s.mean.masked_fill_(again, 0),
            square=s.square.masked_fill_(again, 0),
            c=torch.where(over, following, s.c),
            lower=lower,
            upper=upper,
            left=(s.left - over.long()).clamp_min(0),
            taken=torch.where(over, 0, s.taken),
            hit=s.hit & ~over,
            looked=torch.where(over, float("inf"), s.loss),
        )


def _to_image(tanh: Tensor) -> Tensor:
    return tanh.add(1).mul_(0.5)


@register(
    r"cwl2(?:-(?P<runs>\d+)x(?P<steps>\d+))?",
    help={
        "cwl2": "minimum-L2 attack of Carlini & Wagner 2017: 9 runs of 1000 steps; cwl2-BxK; cwl2-1xK has a "
        "fixed c = 1"
    },
)
def cwl2_attack(match: re.Match[str], radii: Radii) -> CarliniL2:
    """C&W with B runs of K steps; a single one has torchattacks' fixed c and does not end early."""
    eps = radii.eps_under("l2")
    if match["runs"] is None:
        return CarliniL2(eps=eps)
    runs, steps = int(match["runs"]), int(match["steps"])
    if runs == 1:  # a tenth of its few steps would be too short to judge the loss by
        return CarliniL2(binary_steps=1, steps=steps, c=1.0, abort=False, eps=eps)
    return CarliniL2(binary_steps=runs, steps=steps, eps=eps)
