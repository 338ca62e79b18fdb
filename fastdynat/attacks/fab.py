"""FAB (Croce & Hein 2020, arXiv 1907.02044): projections on linearised decision boundaries.

Every iteration linearises the boundaries between the image's class and its rivals at the iterate, moves close
to the nearest of these planes, between iterate and image, and pulls back towards the image once it has
crossed a boundary.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastdynat.attack_engine.ascent import FP16_LOSS_SCALE, Ascent
from fastdynat.attack_engine.attack_result import AttackResult
from fastdynat.attack_engine.goal import wide
from fastdynat.attack_engine.lengths import bounded_gradient, length, per_image
from fastdynat.attack_engine.shrinking_batch import Tick, allowed_halvings, iterate, no_tick, part
from fastdynat.attacks.interface import Nearest
from fastdynat.attacks.plane_search import DUAL, NORMS, move, start_away
from fastdynat.attacks.registry import Radii, register
from fastdynat.errors import UserError, unknown_name
from fastdynat.ops.image_draws import Randomness

EVERY = 5  # iterations between two checks for finished images


@dataclass(frozen=True)
class _State:
    """State of a batch; a row per image."""

    x: Tensor  # the images
    labels: Tensor
    rivals: Tensor  # (N, M) int64: the classes whose boundaries with the image's own are linearised
    z: Tensor  # the iterates
    nearest: Tensor  # the nearest adversarial iterates, the image itself while there is none
    distance: Tensor  # theirs; infinite while there is none, 0 for misclassified clean images
    gradients: Tensor  # (N,) int64: image gradients taken, one per rival
    zeros: Tensor  # (N,) int64: how many of them were 0

    def again(self, rivals: Tensor, z: Tensor) -> "_State":
        """Another run on the same images, which keeps their nearest points."""
        return replace(self, rivals=rivals, z=z)


@dataclass(frozen=True, kw_only=True)
class FAB:
    """FAB on images that are classified correctly. Sizes in [0, 1] pixel units.

    The first run starts at the image, further restarts at a random point `eps` / 2 away.

    Attributes:
        eps: an image with an adversarial image within this distance is finished; see `nearest`.
        norm: linf, l2 or l1.
        targets: attack towards each of this many classes, those with the largest logits at the image first
            (FAB-T); 0 moves to the nearest boundary of all classes, at K - 1 backward passes per iteration.
        nearest: minimise the distance: no image ends early, `eps` is only the restarts' distance and the ball
            in which robustness is judged, and the result is a `Nearest`.
        steps: iterations of each run, each of two forward passes and the backward passes.
        restarts: runs per image (and target).
        alpha_max: largest weight of the move from the image, against the move from the iterate.
        eta: overshoot of a move beyond the linearised boundary; 1 stops on it.
        beta: share of the distance to the image that remains after pulling back.
    """

    eps: float
    norm: str = "linf"
    targets: int = 0
    nearest: bool = False
    steps: int = 100
    restarts: int = 1
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise unknown_name("norm of FAB", self.norm, NORMS)
        if self.eps <= 0:
            raise UserError(f"eps of FAB must be above 0 (pixel units), got {self.eps:g}; write 8/255")
        for name, least in (("targets", 0), ("steps", 1), ("restarts", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} of FAB must be >= {least}, got {getattr(self, name)}")
        for name, low, high in (("alpha_max", 0, 1), ("eta", 1, 2), ("beta", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise UserError(f"{name} of FAB must be in [{low}, {high}], got {getattr(self, name):g}")

    def __call__(
        self,
        ascent: Ascent,
        x: Tensor,
        labels: Tensor,
        *,
        generator: Randomness = None,
        tick: Tick = no_tick,
    ) -> AttackResult:
        """See `Attack`. Without `nearest`, `x_adv` is the image where nothing was found within `eps`."""
        with torch.no_grad():
            logits = ascent.logits(ascent.to_model_input(x))
        right = ~ascent.settle_ties(x, logits, labels)
        runs, none = list(self._rivals_of_runs(logits, labels)), torch.zeros_like(labels)
        distance = torch.where(right, float("inf"), 0.0).to(x.dtype)
        state = _State(x, labels, none[:, None], x, x, distance, gradients=none, zeros=none)
        for k, rivals in enumerate(runs):
            first = k % self.restarts == 0
            z = x if first else start_away(x, self.eps / 2, self.norm, generator=generator)
            state = self._run(ascent, state.again(rivals, z), part(tick, k, len(runs)))
        x_adv, distance, zeros, gradients = (
            state.nearest,
            state.distance,
            state.zeros.sum(),
            int(state.gradients.sum()),
        )
        if self.nearest:
            return Nearest(
                x_adv, zeros, gradients, found=distance.isfinite(), distance=distance, eps=self.eps
            )
        return AttackResult(x_adv.where(per_image(distance <= self.eps, x), x), zeros, gradients)

    def _rivals_of_runs(self, logits: Tensor, labels: Tensor) -> Iterator[Tensor]:
        """The rivals (N, M) of each run, in order."""
        ranked = logits.scatter(1, labels[:, None], float("-inf")).argsort(1, descending=True)[:, :-1]
        for rivals in ranked.split(1, dim=1)[: self.targets] if self.targets else [ranked]:
            yield from [rivals] * self.restarts

    def _open(self, distance: Tensor) -> Tensor:
        """(N,) bool: the images for which a nearer point would matter."""
        return distance > (0 if self.nearest else self.eps)

    def _run(self, ascent: Ascent, begin: _State, tick: Tick) -> _State:
        def step(state: _State, i: int) -> _State:
            return self._step(ascent, state)

        # Images that are finished, or were never right, leave the batch or fill it up to a size that it had
        # before.
        return iterate(
            begin,
            step,
            self.steps,
            done=lambda state: ~self._open(state.distance),
            every=EVERY,
            max_halvings=allowed_halvings(ascent.max_halvings, begin.x),
            tick=tick,
        )

    def _step(self, ascent: Ascent, state: _State) -> _State:
        x, z, read = state.x, state.z, ascent.to_model_input(state.z)
        values, normals = _planes(ascent, read, state.labels, state.rivals)
        value, w, zeros = self._nearest_plane(values.to(x.dtype), normals.to(x.dtype))
        z = move(z, x, w, value, read.to(x.dtype), alpha_max=self.alpha_max, eta=self.eta, norm=self.norm)
        with torch.no_grad():
            logits = ascent.logits(ascent.to_model_input(z))
            crossed = ascent.settle_ties(z, logits, state.labels)
        away, unfinished = length(z - x, self.norm), self._open(state.distance)
        closer = unfinished & crossed & (away < state.distance)
        return replace(
            state,
            z=torch.lerp(x, z, per_image(torch.where(crossed, self.beta, torch.ones_like(away)), x)),
            nearest=torch.where(per_image(closer, x), z, state.nearest),
            distance=torch.where(closer, away, state.distance),
            gradients=state.gradients + unfinished * state.rivals.shape[1],
            zeros=state.zeros + unfinished * zeros,
        )

    def _nearest_plane(self, values: Tensor, normals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Value (N,) and normal (N, ...) of the nearest of M planes, and the number of useless ones."""
        sizes = length(normals.flatten(0, 1), DUAL[self.norm]).view(values.shape)
        usable = (sizes > 0) & sizes.isfinite()
        # Any other gradient makes a plane infinitely far away instead of NaN or at hand.
        nearest = torch.where(usable, values.abs() / sizes, float("inf")).argmin(1)
        rows = torch.arange(len(values), device=values.device)
        return values[rows, nearest], normals[rows, nearest], (~usable).sum(1)


def _planes(ascent: Ascent, read: Tensor, labels: Tensor, rivals: Tensor) -> tuple[Tensor, Tensor]:
    """``z_k - z_y`` for the rivals k (N, M) at the model input, and gradients (N, M, ...), at least float32.

    One forward pass and M backward passes. A plane needs the gradient's length, so it is never rescaled.
    """
    logits, vjp = ascent.vjp(read)
    scale = FP16_LOSS_SCALE if ascent.dtype is torch.float16 else 1.0
    own = torch.zeros_like(logits).scatter_(1, labels[:, None], -scale)
    grads = [vjp(own.scatter(1, rival[:, None], scale)) for rival in rivals.unbind(1)]
    scores = wide(logits)
    normals = bounded_gradient(wide(torch.stack(grads, 1)) / scale)
    return scores.gather(1, rivals) - scores.gather(1, labels[:, None]), normals


@register(
    r"fab(?P<targeted>-t)?(?P<nearest>-min)?(?:-(?P<restarts>\d+))?",
    help={
        "fab": "FAB (Croce & Hein 2020) towards the nearest boundary, until within eps; fab-R",
        "fab-t": "FAB towards nine classes; fab-t-R",
        "fab-min": "FAB as a minimum-norm attack, at any distance; fab-t-min",
    },
    norms=("linf", "l2", "l1"),
)
def fab_attack(match: re.Match[str], radii: Radii) -> FAB:
    """FAB with AutoAttack's numbers."""
    return FAB(
        eps=radii.eps,
        norm=radii.norm,
        targets=9 if match["targeted"] else 0,
        nearest=bool(match["nearest"]),
        restarts=int(match["restarts"] or 1),
    )
