"""The nearest point of the decision boundary: FAB (Croce & Hein 2020) on the scalar soft margin, DyART's
inner problem.

`soft_margin` makes one function per image of K - 1 boundaries; its zeros lie inside the true boundary, so
that distances are lower bounds of the margin. Every iteration takes the plane that the function's gradient
predicts, goes to where this plane is near both the iterate and the image, and once across, pulls back towards
the image. All images of a batch are carried through all iterations and masked, so that shapes are fixed and
nothing waits for the device.

One detail of the released code (arXiv 2302.03015) is not copied: by an indexing slip it takes the weight
between iterate and image from the batch's first image for all images. Here each image has its own, as the FAB
paper writes it.
"""

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.attack_result import AttackResult
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.network_modes import attack_mode
from fastdynat.attack_engine.pgd import check_batch
from fastdynat.attack_engine.plane_search import length, move, per_image, start_away
from fastdynat.errors import UserError
from fastdynat.models.logits import half_of
from fastdynat.ops import soft_margin

# Images whose soft margin is not above this have no boundary to look for.
LEAST_MARGIN = 1e-9
# The approximate optimality test of the found point, DyART's `use_high_quality`.
DEEPEST_MARGIN, NEAR_MAXIMAL, DESCENT, DESCENDING_SHARE, FLAT = -0.3, 0.8, 1e-7, 0.9, 0.1


@dataclass(frozen=True, kw_only=True)
class BoundarySpec:
    """The numbers of one search under L-inf; the defaults are DyART's. Sizes in [0, 1] pixel units.

    Attributes:
        steps: iterations, each of two forward passes and one backward pass to the input.
        eps_start: the search begins at L-inf distance eps_start / 2 from the image, in a random direction; 0
            is at the image.
        alpha_max: the most that the move from the image weighs beside the move from the iterate.
        eta: how far a move goes beyond the predicted boundary, 1 is onto it.
        beta_back: what is left of the distance to the image after pulling back.
        temperature: of the soft margin.
        flat_pixel_test: `Boundary.usable` asks for a pixel that moved less than the farthest ones and whose
            gradient is at most 0.1, as DyART's code does. Where all pixels move as far, as on most images of
            a linear network, there is none.
    """

    steps: int = 20
    eps_start: float = 8 / 255
    alpha_max: float = 0.1
    eta: float = 1.05
    beta_back: float = 0.9
    temperature: float = 5.0
    flat_pixel_test: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"the boundary search needs steps >= 1, got {self.steps}; DyART takes 20")
        for name, low, high in (("eps_start", 0, 1), ("alpha_max", 0, 1), ("eta", 1, 2), ("beta_back", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise UserError(
                    f"{name} of the boundary search must be in [{low}, {high}], got {getattr(self, name):g}"
                )
        if not 0 < self.temperature < float("inf"):
            raise UserError(
                f"temperature of the soft margin must be above 0, got {self.temperature:g}; DyART takes 5"
            )


@dataclass(frozen=True, kw_only=True)
class Boundary(AttackResult):
    """The nearest boundary points that a search found; `x_adv` is the image itself where it found none.

    Attributes:
        found: (N,) bool: a point with negative soft margin was found. Never where the image's own is 1e-9 or
            less.
        distance: (N,) L-inf distance of `x_adv` from the image; 0 where none was found.
        margin: (N,) soft margin at `x_adv`, just below 0 where found.
        grad_norm: (N,) L1 norm of the margin's gradient at `x_adv`, the dual of the distance's.
        usable: (N,) bool: found, the gradient is not 0, and nearly a nearest point: the margin is above -0.3,
            and more than 90 % of the pixels that moved by more than 80 % of the distance moved against the
            gradient; with `flat_pixel_test`, one of the others has a gradient of at most 0.1.
    """

    found: Tensor
    distance: Tensor
    margin: Tensor
    grad_norm: Tensor
    usable: Tensor

    def clone(self) -> "Boundary":
        """A copy in memory of its own."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        copies: dict[str, Any] = {
            name: v.clone() if isinstance(v, Tensor) else v for name, v in values.items()
        }
        return Boundary(**copies)


def run_boundary(
    ascent: Ascent,
    x: Tensor,
    labels: Tensor,
    spec: BoundarySpec,
    *,
    x_start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Boundary:
    """Search from `x` (N, C, H, W) on a network that is in eval mode already; the caller owns grad mode.

    x_start: begin exactly here instead of drawing a start.
    """
    z = boundary_start(x, spec.eps_start, generator=generator) if x_start is None else x_start.detach()
    # Distances jump from infinity where a point has crossed the boundary, which rounding decides; the nearest
    # points tell them.
    names = ("point", "model input", "nearest point", "", "count of zero gradients")
    iterate = ascent.compiled(
        partial(_iterate, spec=spec), key=replace(spec, steps=1, eps_start=0.0), names=names
    )
    # What no distance is below can never be improved: this alone keeps an image out of the search.
    distance = torch.where(_margin(ascent, x, labels, spec) > LEAST_MARGIN, float("inf"), float("-inf")).to(
        x.dtype
    )
    nearest, model_input = (
        x.clone(),
        ascent.to_model_input(z),
    )  # not x itself: aliases would be compiled apart
    zero_grads = torch.zeros((), dtype=torch.int64, device=x.device)
    for _ in range(spec.steps):
        z, model_input, nearest, distance, zeros = iterate(z, model_input, x, labels, nearest, distance)
        zero_grads = zero_grads + zeros
    margin, grad = ascent.margin_and_grad(ascent.to_model_input(nearest), labels, spec.temperature)
    found = distance.isfinite()
    grad_norm = grad.abs().flatten(1).sum(1)
    return Boundary(
        nearest.detach(),
        zero_grads,
        x.shape[0] * spec.steps,
        found=found,
        distance=torch.where(found, distance, 0.0),
        margin=margin,
        grad_norm=grad_norm,
        usable=found
        & (grad_norm > 0)
        & nearly_nearest(nearest - x, margin, grad, flat_pixel_test=spec.flat_pixel_test),
    )


def boundary_start(x: Tensor, eps: float, *, generator: torch.Generator | None = None) -> Tensor:
    """``clip(x + eps / 2 * u / ||u||_inf)`` with u uniform in the cube: at L-inf distance eps / 2, but for
    clipping.
    """
    return start_away(x, eps / 2, generator=generator)


def _iterate(
    ascent: Ascent,
    z: Tensor,
    model_input: Tensor,
    x: Tensor,
    labels: Tensor,
    nearest: Tensor,
    distance: Tensor,
    *,
    spec: BoundarySpec,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One iteration from point `z`: linearise, move, and where the boundary was crossed keep the point.

    Returns:
        The next point, its model input, nearest point and its distance so far, and how many gradients were 0.
    """
    margin, w = ascent.margin_and_grad(model_input, labels, spec.temperature)
    zeros = (~(w.abs().flatten(1).amax(1) > 0)).sum()
    # The plane is tangent at the model input, which is rounded in half precision.
    w, value, at = w.to(x.dtype), margin.to(x.dtype), model_input.to(x.dtype)
    z = move(z, x, w, value, at, alpha_max=spec.alpha_max, eta=spec.eta)
    crossed = _margin(ascent, z, labels, spec) < 0
    away = length(z - x, "linf")
    closer = crossed & (away < distance)
    nearest = torch.where(per_image(closer, x), z, nearest)
    distance = torch.where(closer, away, distance)
    z = torch.lerp(x, z, per_image(torch.where(crossed, spec.beta_back, torch.ones_like(away)), x))
    return z, ascent.to_model_input(z), nearest, distance, zeros


def nearly_nearest(moved: Tensor, margin: Tensor, grad: Tensor, *, flat_pixel_test: bool = False) -> Tensor:
    """(N,) bool: the margin is shallow, the pixels that moved farthest moved against the gradient, and
    another is flat (`Boundary.usable`).
    """
    moved, grad = moved.flatten(1), grad.flatten(1)
    farthest = moved.abs() > NEAR_MAXIMAL * moved.abs().amax(1, keepdim=True)
    descending = farthest & (moved * grad < -DESCENT)
    near = (margin > DEEPEST_MARGIN) & (descending.sum(1) > DESCENDING_SHARE * farthest.sum(1))
    return near & (~farthest & (grad.abs() <= FLAT)).any(1) if flat_pixel_test else near


def _margin(ascent: Ascent, x: Tensor, labels: Tensor, spec: BoundarySpec) -> Tensor:
    with torch.no_grad():
        return soft_margin(ascent.logits(ascent.to_model_input(x)), labels, temperature=spec.temperature)


def boundary(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    spec: BoundarySpec,
    *,
    x_start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Boundary:
    """Search the boundary of `model` in eval mode and full precision, whatever state the caller is in, as
    `pgd` attacks it.

    Args:
        model: images in [0, 1] -> logits (N, K).
        x: (N, C, H, W), float32 or float64, in [0, 1].
        labels: (N,) int64.
        x_start: begin exactly here instead of drawing a start.
        generator: source of the random start; None is torch's global one.

    Raises:
        UserError: `x` is not float32 or float64, or there are not as many labels.
    """
    labels = check_batch(x, AttackGoal("margin", labels)).target
    half_of(model, x.dtype)
    with torch.inference_mode(False), torch.enable_grad(), attack_mode(model, "eval"):
        x, labels = x.detach().clone(), labels.clone()
        x_start = None if x_start is None else x_start.detach().clone()
        return run_boundary(Ascent(model), x, labels, spec, x_start=x_start, generator=generator)
