"""Nearest point of the decision boundary: FAB on the scalar soft margin, DyART's inner problem.

FAB is Croce & Hein 2020 (arXiv 1907.02044), DyART is arXiv 2302.03015. `soft_margin` turns the K - 1
boundaries of an image into one function, whose zeros lie inside the true boundary: distances are lower bounds
of the margin. Each iteration linearises the function, moves close to the plane of its zeros, between the
iterate and the image, and once across the boundary pulls back towards the image. All images of a batch run
through all iterations under a mask, so shapes are fixed and nothing waits for the device.

One detail of DyART's released code is not copied: an indexing slip makes it use the first image's weight
between iterate and image for the whole batch. Here each image has its own, as in the FAB paper.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from fastdynat.attack_engine.ascent import Ascent
from fastdynat.attack_engine.attack_result import AttackResult
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.lengths import length, per_image
from fastdynat.attack_engine.network_modes import attack_mode
from fastdynat.attack_engine.pgd import check_batch
from fastdynat.attacks.plane_search import move, start_away
from fastdynat.errors import UserError
from fastdynat.models.logits import half_of
from fastdynat.ops import soft_margin
from fastdynat.ops.image_draws import Randomness

# Images whose soft margin is no larger are misclassified and are not searched.
LEAST_MARGIN = 1e-9
# Approximate optimality test of the found point, DyART's `use_high_quality` (`Boundary.usable`).
DEEPEST_MARGIN = -0.3
NEAR_MAXIMAL = 0.8
DESCENT = 1e-7
DESCENDING_SHARE = 0.9
FLAT = 0.1


@dataclass(frozen=True, kw_only=True)
class BoundarySpec:
    """Hyperparameters of the search under L-inf; the defaults are DyART's. Sizes in [0, 1] pixel units.

    Attributes:
        steps: iterations, each of two forward passes and one backward pass.
        eps_start: the search starts at L-inf distance eps_start / 2 from the image, in a random direction; 0
            starts at the image.
        alpha_max: largest weight of the move from the image, against the move from the iterate.
        eta: overshoot of a move beyond the predicted boundary; 1 stops on it.
        beta_back: share of the distance to the image that remains after pulling back.
        temperature: of the soft margin.
        flat_pixel_test: `Boundary.usable` also requires a pixel that moved less than the farthest ones and
            has a gradient of at most 0.1, as DyART's code does. If all pixels move equally far, as on most
            images of a linear network, there is no such pixel.
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
    """Nearest boundary points of a search; `x_adv` is the image itself where none was found.

    Attributes:
        found: (N,) bool: a point with negative soft margin was found; never where the image's own soft margin
            is 1e-9 or less.
        distance: (N,) L-inf distance of `x_adv` from the image; 0 where none was found.
        margin: (N,) soft margin at `x_adv`, just below 0 where found.
        grad_norm: (N,) L1 norm, dual to L-inf, of the margin's gradient at `x_adv`.
        usable: (N,) bool: found, with a nonzero gradient, and nearly nearest: the margin is above -0.3, and
            of the pixels that moved more than 80 % of the distance, more than 90 % moved against the
            gradient; with `flat_pixel_test`, another pixel has a gradient of at most 0.1.
    """

    found: Tensor
    distance: Tensor
    margin: Tensor
    grad_norm: Tensor
    usable: Tensor


def run_boundary(
    ascent: Ascent,
    x: Tensor,
    labels: Tensor,
    x_start: Tensor | None = None,
    *,
    spec: BoundarySpec,
    generator: Randomness = None,
) -> Boundary:
    """Search the boundary from `x` (N, C, H, W) on a network in eval mode; the caller sets grad mode.

    x_start: starting points; None draws them (`boundary_start`).
    """
    z = boundary_start(x, spec.eps_start, generator=generator) if x_start is None else x_start.detach()
    # Distances start at infinity, so rounding at the boundary decides whether they are finite: the comparison
    # of compiled code looks at the nearest points instead.
    names = ("point", "model input", "nearest point", "", "count of zero gradients")
    iterate = ascent.compiled(
        partial(_iterate, spec=spec), key=replace(spec, steps=1, eps_start=0.0), names=names
    )
    # No distance is below -inf, so a misclassified image never gets a point.
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
    near = nearly_nearest(nearest - x, margin, grad, flat_pixel_test=spec.flat_pixel_test)
    return Boundary(
        nearest.detach(),
        zero_grads,
        x.shape[0] * spec.steps,
        found=found,
        distance=torch.where(found, distance, 0.0),
        margin=margin,
        grad_norm=grad_norm,
        usable=found & (grad_norm > 0) & near,
    )


def boundary_start(x: Tensor, eps: float, *, generator: Randomness = None) -> Tensor:
    """``clip(x + eps / 2 * u / ||u||_inf)``, u uniform: L-inf distance eps / 2 before clipping."""
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
    """(N,) bool: the optimality test of `Boundary.usable`. moved, grad: (N, C, H, W)."""
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
    generator: Randomness = None,
) -> Boundary:
    """Search the boundary of `model` in eval mode and its own precision, independent of the caller's modes.

    Args:
        model: images in [0, 1] -> logits (N, K).
        x: (N, C, H, W), float32 or float64, in [0, 1]; rounded for a model in half precision.
        labels: (N,) int64.
        x_start: starting points; None draws them (`boundary_start`).
        generator: source of the random start, a ``torch.Generator`` or `ImageDraws` of the images; None is
            torch's global generator.

    Raises:
        UserError: `x` is not float32 or float64 or not in [0, 1], or the number of labels differs.
    """
    labels = check_batch(x, AttackGoal("margin", labels)).target
    ascent = Ascent(model, dtype=half_of(model, x.dtype))
    with torch.inference_mode(False), torch.enable_grad(), attack_mode(model, "eval"):
        x, labels = x.detach().clone(), labels.clone()
        x_start = None if x_start is None else x_start.detach().clone()
        return run_boundary(ascent, x, labels, x_start, spec=spec, generator=generator)
