"""DeepFool (Moosavi-Dezfooli et al. 2016, arXiv 1511.04599), batched."""

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.goal import wide
from fastdynat.attack_engine.lengths import bounded_gradient, length, per_image
from fastdynat.attack_engine.shrinking_batch import Tick, allowed_halvings, iterate, no_tick
from fastdynat.attacks.interface import Nearest
from fastdynat.attacks.nearest import margin_goal, result, score
from fastdynat.attacks.plane_search import DUAL
from fastdynat.attacks.registry import Radii, register
from fastdynat.errors import UserError, unknown_name
from fastdynat.ops.image_draws import Randomness

# The shortest move (the authors' code adds as much to each). Clipping shortens moves, so that iterates would
# approach the boundary without crossing it, or cross it by no more than rounding.
LEAST_MOVE = 1e-4
NORMS = ("l2", "linf")


@dataclass(frozen=True)
class _State:
    """A row per image."""

    x_adv: Tensor
    labels: Tensor
    rivals: Tensor  # (N, classes - 1)
    fooled: Tensor
    asked: Tensor
    zeros: Tensor


@dataclass(frozen=True, kw_only=True)
class DeepFool:
    """Moves repeatedly to the nearest linearised boundary ``f_k = f_y`` and slightly beyond, in [0, 1].

    Memory is that of one forward pass and a few images for any number of classes: each class takes one
    backward pass, and only the nearest plane's gradient is kept. An image leaves the batch once it is
    misclassified.

    Attributes:
        norm: "l2" or "linf".
        steps: maximum number of iterations.
        overshoot: extra length of a step, as a share of the distance to the plane.
        classes: candidates: the label, and the other classes with the highest logits at the image.
        eps: radius of the ball in which robustness is judged (`Nearest.eps`).
    """

    norm: str = "l2"
    steps: int = 50
    overshoot: float = 0.02
    classes: int = 10
    eps: float = float("inf")

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise unknown_name("norm of DeepFool", self.norm, NORMS)
        if self.steps < 1 or self.classes < 2:
            raise UserError(
                f"DeepFool needs steps >= 1 and classes >= 2, got {self.steps} and {self.classes}"
            )
        if not 0 <= self.overshoot < float("inf"):
            raise UserError(f"overshoot of DeepFool must be >= 0, got {self.overshoot:g}")

    def __call__(
        self,
        ascent: Ascent,
        x: Tensor,
        labels: Tensor,
        *,
        generator: Randomness = None,
        tick: Tick = no_tick,
    ) -> Nearest:
        with torch.no_grad():
            logits = ascent.logits(ascent.to_model_input(x))
        others = logits.scatter(1, labels[:, None], float("-inf"))
        rivals = others.topk(min(self.classes, logits.shape[1]) - 1).indices
        none = torch.zeros_like(labels)
        begin = _State(x, labels, rivals, ascent.settle_ties(x, logits, labels), none, none)
        end = iterate(
            begin,
            lambda s, i: self._step(s, ascent),
            self.steps,
            done=lambda s: s.fooled,
            every=1,
            max_halvings=allowed_halvings(ascent.max_halvings, x),
            tick=tick,
        )
        distance = length(end.x_adv - x, self.norm)
        return result(x, end.x_adv, end.fooled, distance, eps=self.eps, zeros=end.zeros, asked=end.asked)

    def _step(self, s: _State, ascent: Ascent) -> _State:
        gap, grad, flat = self._nearest_plane(s, ascent)
        norm = length(grad, DUAL[self.norm])
        direction = grad.sign() if self.norm == "linf" else grad / per_image(norm, grad)
        move = direction * per_image((1 + self.overshoot) * (gap.abs() / norm).clamp_min(LEAST_MOVE), grad)
        stays = s.fooled | ~(norm > 0)
        x_adv = torch.where(per_image(stays, grad), s.x_adv, (s.x_adv + move).clamp(0, 1))
        going = ~s.fooled
        fooled = s.fooled | (score(ascent, x_adv, margin_goal(s.labels), going) > 0)
        return replace(
            s,
            x_adv=x_adv,
            fooled=fooled,
            asked=s.asked + going * s.rivals.shape[1],
            zeros=s.zeros + going * flat,
        )

    def _nearest_plane(self, s: _State, ascent: Ascent) -> tuple[Tensor, Tensor, Tensor]:
        """``f_k - f_y`` of the nearest plane (N,), its gradient, and the number of useless planes (N,)."""
        logits, vjp = ascent.vjp(ascent.to_model_input(s.x_adv))
        gaps = wide(logits).gather(1, s.rivals) - wide(logits).gather(1, s.labels[:, None])
        best, nearest, flat = (
            torch.full_like(gaps[:, 0], float("inf")),
            torch.zeros_like(s.x_adv),
            torch.zeros_like(s.labels),
        )
        plane = torch.zeros_like(s.labels)
        for k in range(s.rivals.shape[1]):
            weights = (
                torch.zeros_like(logits)
                .scatter_(1, s.rivals[:, k, None], 1)
                .scatter_(1, s.labels[:, None], -1)
            )
            grad = bounded_gradient(vjp(weights).to(s.x_adv.dtype))
            norm = length(grad, DUAL[self.norm])
            usable = (norm > 0) & norm.isfinite()
            distance = torch.where(usable, gaps[:, k].abs() / norm, float("inf"))
            closer = distance < best
            best, plane = torch.where(closer, distance, best), torch.where(closer, k, plane)
            torch.where(per_image(closer, grad), grad, nearest, out=nearest)
            flat = flat + ~usable
        return gaps.gather(1, plane[:, None])[:, 0].to(nearest.dtype), nearest, flat


@register(
    r"deepfool(?P<norm>-linf)?(?P<steps>\d+)?",
    help={
        "deepfool": "minimum-L2 attack DeepFool (Moosavi-Dezfooli et al. 2016), 50 steps; deepfoolK",
        "deepfool-linf": "DeepFool as a minimum-L-inf attack",
    },
)
def deepfool_attack(match: re.Match[str], radii: Radii) -> DeepFool:
    """DeepFool in its own norm."""
    norm = "linf" if match["norm"] else "l2"
    return DeepFool(norm=norm, steps=int(match["steps"] or DeepFool.steps), eps=radii.eps_under(norm))
