"""Sigma-zero (Cina et al. 2024, arXiv 2402.01879): a minimum-L0 attack on a smooth approximation of L0."""

import math
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

LAST_LR = 0.1  # of the first, at the end of the cosine
LEAST_NORM = 1e-12


@dataclass(frozen=True)
class _State:
    """A row per image. `x_adv` and Adam's moments are written in place."""

    x: Tensor
    target: Tensor
    x_adv: Tensor
    mean: Tensor
    square: Tensor
    nearest: Tensor
    changed: Tensor  # changed pixels of `nearest`; one more than the image has: none found
    unit: Tensor  # of margins, `logit_unit`
    threshold: Tensor
    asked: Tensor
    zeros: Tensor


@dataclass(frozen=True, kw_only=True)
class SigmaZero:
    """Minimises ``max(-margin, 0) + mean(m^2 / (m^2 + sigma))``, m the perturbation, by Adam.

    After every step, changes below a threshold are undone; each image's threshold rises while the image is
    misclassified and falls while it is not. The misclassified iterate with the fewest changed pixels is
    returned; a pixel counts as changed if any channel is, as for PGD under L0. The approximation of L0 is
    over values, one per channel of a pixel, as in the released code. The defaults are that code's, the number
    of steps is the paper's.

    JSMA was not chosen, because its saliency map of pairs takes d^2 numbers per image (9.4 million on CIFAR).
    This attack needs the memory of a few images per image, which is tested.

    Attributes:
        steps: of Adam, with a cosine from `lr` to a tenth of it.
        lr: Adam's first step size.
        sigma: smoothness of the approximation; smaller is closer to L0.
        threshold: initial threshold.
        threshold_rate: its change per step, as a multiple of the step size.
        eps: number of changed pixels at which robustness is judged (`Nearest.eps`).
    """

    steps: int = 1000
    lr: float = 1.0
    sigma: float = 1e-3
    threshold: float = 0.3
    threshold_rate: float = 0.01
    eps: float = float("inf")

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"sigma-zero needs steps >= 1, got {self.steps}")
        for name in ("lr", "sigma", "threshold", "threshold_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} of sigma-zero must be above 0, got {getattr(self, name):g}")

    @property
    def norm(self) -> str:
        return "l0"

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
        down = descent(ascent, goal.kind)
        already, none = score(ascent, x, goal) > 0, torch.zeros_like(goal.target)
        pixels = x[0, 0].numel()
        begin = _State(
            x=x,
            target=goal.target,
            x_adv=x.clone(),
            mean=torch.zeros_like(x),
            square=torch.zeros_like(x),
            nearest=x.clone(),
            changed=torch.where(already, 0, pixels + 1),
            unit=logit_unit(ascent, x),
            threshold=torch.full_like(x[:, 0, 0, 0], self.threshold),
            asked=none,
            zeros=none,
        )
        end = iterate(
            begin,
            lambda s, i: self._step(s, i, down),
            self.steps,
            done=lambda s: s.changed <= 1,  # nothing is nearer
            max_halvings=allowed_halvings(ascent.max_halvings, x),
            tick=tick,
        )
        found = end.changed <= pixels
        return result(
            x, end.nearest, found, end.changed.to(x.dtype), eps=self.eps, zeros=end.zeros, asked=end.asked
        )

    def _step(self, s: _State, i: int, down: Callable[..., tuple[Tensor, Tensor]]) -> _State:
        running = s.changed > 1
        margin, grad = down(s.x_adv, s.target, running)
        adversarial = margin > 0
        moved = s.x_adv - s.x
        changed = (moved != 0).any(1).sum((1, 2))
        fewer = adversarial & running & (changed < s.changed)
        torch.where(per_image(fewer, moved), s.x_adv, s.nearest, out=s.nearest)
        zeros = (length(grad, "linf") == 0) & (margin < 0) & running
        grad.mul_(per_image(s.unit * (margin < 0), grad))  # of the hinge
        # The gradient of the approximation: 2 sigma m / (m^2 + sigma)^2 per value.
        grad.addcdiv_(moved, moved.square().add_(self.sigma).square_(), value=2 * self.sigma / s.x[0].numel())
        norm = length(grad, "linf").clamp_min(LEAST_NORM)
        grad.div_(per_image(norm, grad))
        adam_(s.x_adv, s.mean, s.square, grad, lr=self._lr(i), taken=torch.tensor(i + 1))
        s.x_adv.clamp_(0, 1)
        rate = self.threshold_rate * self._lr(i + 1)
        threshold = (s.threshold + torch.where(adversarial, rate, -rate)).clamp(0, 1)
        small = torch.sub(s.x_adv, s.x, out=moved).abs_() < per_image(threshold, moved)
        torch.where(small, s.x, s.x_adv, out=s.x_adv)
        return replace(
            s,
            changed=torch.where(fewer, changed, s.changed),
            threshold=threshold,
            asked=s.asked + running,
            zeros=s.zeros + zeros,
        )

    def _lr(self, i: int) -> float:
        last = LAST_LR * self.lr
        return last + (self.lr - last) * (1 + math.cos(math.pi * i / self.steps)) / 2


@register(
    r"sigmazero(?P<steps>\d+)?",
    help={"sigmazero": "minimum-L0 attack sigma-zero (Cina et al. 2024), 1000 steps; sigmazeroK"},
)
def sigma_zero_attack(match: re.Match[str], radii: Radii) -> SigmaZero:
    """Sigma-zero, which counts pixels."""
    return SigmaZero(steps=int(match["steps"] or SigmaZero.steps), eps=radii.eps_under("l0"))
