"""FAB (Croce & Hein 2020, arXiv 1907.02044): the nearest adversarial image by projections on linearised
decision boundaries.

Every iteration linearises the boundaries between the image's class and its rivals at the iterate, takes the
nearest of these planes, goes to where it is near both the iterate and the image, and once across a boundary
pulls back towards the image.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastdynat.attack_engine.ascent import FP16_LOSS_SCALE, Ascent
from fastdynat.attack_engine.attack_result import AttackResult
from fastdynat.attack_engine.goal import wide
from fastdynat.attack_engine.shrinking_batch import Tick, allowed_halvings, iterate, no_tick, part
from fastdynat.attacks.interface import Nearest
from fastdynat.attacks.plane_search import DUAL, NORMS, length, move, per_image, start_away
from fastdynat.attacks.registry import Radii, register
from fastdynat.errors import UserError, unknown_name

EVERY = 5  # iterations between two looks for finished images


@dataclass(frozen=True)
class _Walk:
    """Where the walks of a batch are, one row each."""

    x: Tensor  # the images
    labels: Tensor
    rivals: Tensor  # (N, M) int64: the classes whose boundaries with the image's own are linearised
    z: Tensor  # the iterates
    nearest: Tensor  # the nearest adversarial iterates, the image itself while there is none
    distance: Tensor  # theirs; infinite while there is none, 0 of images that are misclassified as they are
    gradients: Tensor  # (N,) int64: image gradients taken, one per rival
    zeros: Tensor  # (N,) int64: how many of them were 0

    def again(self, rivals: Tensor, z: Tensor) -> "_Walk":
        """Another walk of the same images: what has been found stays unless something nearer is."""
        return replace(self, rivals=rivals, z=z)


@dataclass(frozen=True, kw_only=True)
class FAB:
    """FAB as an attack of an evaluation, on images that are classified correctly. Sizes in [0, 1] pixel
    units.

    It begins at the image itself, and from the second restart on at a random point `eps` / 2 away.

    Attributes:
        eps: images with an adversarial image at this distance are finished, at once; see `nearest`.
        norm: linf, l2 or l1.
        targets: walk towards each of this many classes, those with the largest logits at the image first
            (FAB-T); 0 walks towards the nearest boundary of all, which takes K - 1 backward passes per
            iteration.
        nearest: whether to look for the nearest adversarial images instead: nothing ends early, `eps` says
            where restarts begin and what a verdict is about, and the result is a `Nearest`.
        steps: iterations of each walk, each of two forward passes and the backward passes.
        restarts: walks per image (and target).
        alpha_max: the most that the move from the image weighs beside the move from the iterate.
        eta: how far a move goes beyond the linearised boundary, 1 is onto it.
        beta: what is left of the distance to the image after pulling back.
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
        generator: torch.Generator | None = None,
        tick: Tick = no_tick,
    ) -> AttackResult:
        """See `Search`. Without `nearest`, `x_adv` is the image itself where nothing was found within
        `eps`.
        """
        with torch.no_grad():
            logits = ascent.logits(ascent.to_model_input(x))
        right = logits.argmax(1) == labels
        legs, none = list(self._legs(logits, labels)), torch.zeros_like(labels)
        distance = torch.where(right, float("inf"), 0.0).to(x.dtype)
        walk = _Walk(x, labels, none[:, None], x, x, distance, gradients=none, zeros=none)
        for k, rivals in enumerate(legs):
            first = k % self.restarts == 0
            z = x if first else start_away(x, self.eps / 2, self.norm, generator=generator)
            walk = self._walk(ascent, walk.again(rivals, z), part(tick, k, len(legs)))
        x_adv, distance, zeros, gradients = (
            walk.nearest,
            walk.distance,
            walk.zeros.sum(),
            int(walk.gradients.sum()),
        )
        if self.nearest:
            return Nearest(
                x_adv, zeros, gradients, found=distance.isfinite(), distance=distance, eps=self.eps
            )
        return AttackResult(x_adv.where(per_image(distance <= self.eps, x), x), zeros, gradients)

    def _legs(self, logits: Tensor, labels: Tensor) -> Iterator[Tensor]:
        """The rivals (N, M) of each walk, in order."""
        ranked = logits.scatter(1, labels[:, None], float("-inf")).argsort(1, descending=True)[:, :-1]
        for rivals in ranked.split(1, dim=1)[: self.targets] if self.targets else [ranked]:
            yield from [rivals] * self.restarts

    def _open(self, distance: Tensor) -> Tensor:
        """(N,) bool: which images a nearer point would make a difference to."""
        return distance > (0 if self.nearest else self.eps)

    def _walk(self, ascent: Ascent, begin: _Walk, tick: Tick) -> _Walk:
        def step(walk: _Walk, i: int) -> _Walk:
            return self._step(ascent, walk)

        # Images that are finished, or were never right, leave the batch or fill it up to a size that it had
        # before.
        return iterate(
            begin,
            step,
            self.steps,
            done=lambda walk: ~self._open(walk.distance),
            every=EVERY,
            max_halvings=allowed_halvings(ascent.max_halvings, begin.x),
            tick=tick,
        )

    def _step(self, ascent: Ascent, walk: _Walk) -> _Walk:
        x, z, read = walk.x, walk.z, ascent.to_model_input(walk.z)
        value, w, zeros = self._nearest_plane(*_planes(ascent, read, walk.labels, walk.rivals))
        z = move(z, x, w, value, read.to(x.dtype), alpha_max=self.alpha_max, eta=self.eta, norm=self.norm)
        with torch.no_grad():
            crossed = ascent.logits(ascent.to_model_input(z)).argmax(1) != walk.labels
        away, unfinished = length(z - x, self.norm), self._open(walk.distance)
        closer = unfinished & crossed & (away < walk.distance)
        return replace(
            walk,
            z=torch.lerp(x, z, per_image(torch.where(crossed, self.beta, torch.ones_like(away)), x)),
            nearest=torch.where(per_image(closer, x), z, walk.nearest),
            distance=torch.where(closer, away, walk.distance),
            gradients=walk.gradients + unfinished * walk.rivals.shape[1],
            zeros=walk.zeros + unfinished * zeros,
        )

    def _nearest_plane(self, values: Tensor, normals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of planes (N, M) the nearest ones' values (N,) and normals (N, ...), and how many normals were 0,
        (N,).
        """
        sizes = length(normals.flatten(0, 1), DUAL[self.norm]).view(values.shape)
        # A gradient of 0 makes a plane that is far away, and not NaN.
        nearest = torch.where(sizes > 0, values.abs() / sizes, float("inf")).argmin(1)
        rows = torch.arange(len(values), device=values.device)
        return values[rows, nearest], normals[rows, nearest], (~(sizes > 0)).sum(1)


def _planes(ascent: Ascent, read: Tensor, labels: Tensor, rivals: Tensor) -> tuple[Tensor, Tensor]:
    """``z_k - z_y`` for the rivals k (N, M) at what the network reads, and its gradients (N, M, ...), at
    least float32.

    One forward pass and M backward passes. Whoever wants a plane needs the gradient's length: it is never
    rescaled.
    """
    logits, vjp = ascent.vjp(read)
    scale = FP16_LOSS_SCALE if ascent.dtype is torch.float16 else 1.0
    own = torch.zeros_like(logits).scatter_(1, labels[:, None], -scale)
    grads = [vjp(own.scatter(1, rival[:, None], scale)) for rival in rivals.unbind(1)]
    scores = wide(logits)
    return scores.gather(1, rivals) - scores.gather(1, labels[:, None]), wide(torch.stack(grads, 1)) / scale


@register(
    r"fab(?P<targeted>-t)?(?P<nearest>-min)?(?:-(?P<restarts>\d+))?",
    help={
        "fab": "FAB (Croce & Hein 2020) towards the nearest boundary, ended at eps; fab-R",
        "fab-t": "FAB towards nine classes; fab-t-R",
        "fab-min": "the nearest by FAB at any distance; fab-t-min",
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
