"""DyART: dynamics-aware robust training (Xu et al., ICLR 2023, arXiv 2302.03015).

The update moves the decision boundary away from the images. R(x) is the L-inf distance of x to the zero set
of the soft margin Phi::

    min  CE(f(x), y) + margin_weight * h(R(x)),   h(R) = exp(-decay R) / decay for R < r0, constant from r0 on

The gradient of R has a closed form: that of Phi at the nearest boundary point x^, over ||grad_x Phi(x^)||_1.
Nothing is differentiated through the search. The loss here has this gradient, with w a constant::

    -(margin_weight / N) sum_i w_i Phi(x^_i),   w = exp(-decay R) / ||grad_x Phi(x^)||_1 for R < r0, else 0

An image contributes only its cross-entropy (w = 0) if the model misclassifies it (Phi <= 0), no boundary
point is found, or the point fails the quality filter; N counts all images. The model sees the boundary points
first and then the images, in train mode, as two batches; search, R and gradient norm use eval mode.

One difference to the released code: there the model sees only the points that pass, a batch of another size
at every step. Here the batch keeps its shape, and a failed search leaves its last point, the image itself if
nothing was found. This affects the batch statistics of that pass alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from fastdynat.attack_engine.engine import Attacker
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attacks import AttackResult
from fastdynat.attacks.boundary_search import Boundary, BoundarySpec, run_boundary
from fastdynat.data import Batch
from fastdynat.errors import UserError
from fastdynat.methods import (
    MOST,
    AttackDefaults,
    Inner,
    Method,
    MethodOptions,
    Networks,
    Outer,
    check_numbers,
    check_positive,
    logged_mean,
    register_method,
)
from fastdynat.methods.building_blocks import batch_share
from fastdynat.ops import soft_margin
from fastdynat.units import parse_size


@dataclass(frozen=True, kw_only=True)
class DyartOptions(MethodOptions):
    """Options of DyART, by default the release's for CIFAR-10.

    `--steps` counts the iterations of the search, which starts eps / 2 away from the image.
    """

    margin_weight: float = 1000.0
    """Weight of the margin's loss beside the cross-entropy (the paper's lambda)."""

    decay: float = 3.0
    """Rate at which a margin's weight decays with the margin, per unit of the [0, 1] pixel range (the paper's
    alpha)."""

    r0: float | str = "16/255"
    """Margins of this size or more are large enough and get no weight; written like a radius: 16/255, 0.063,
    or 16 (read as 16/255)."""

    temperature: float = 5.0
    """Temperature of the soft margin; a larger one is nearer to the margin."""

    quality_filter: bool = True
    """Use only boundary points that are nearly the nearest ones: just beyond the boundary, and reached
    against the gradient."""

    flat_pixel_test: bool = True
    """Third test of the quality filter, from the release: some pixel that moved less than the farthest ones
    has a gradient of at most 0.1."""

    def check(self) -> None:
        check_numbers(self, "margin_weight")
        if not 0 < self.decay <= MOST:
            raise UserError(f"decay must be above 0, got {self.decay:g}; DyART takes 3 to 8")
        parse_size(self.r0, "r0")
        check_positive(self, "temperature")


@register_method("dyart")
class Dyart(Method[DyartOptions]):
    """Dynamics-aware robust training, L-inf."""

    unused_attack = ("step_size", "start")
    takes_any_attack = False
    options_type = DyartOptions
    smooths_labels = True
    attack_defaults = AttackDefaults(steps=20)
    logs_adv_acc = False

    def __init__(self, options: DyartOptions) -> None:
        super().__init__(options)
        self._r0 = parse_size(options.r0, "r0").value
        self._search = BoundarySpec(temperature=options.temperature, flat_pixel_test=options.flat_pixel_test)

    def check_attack(self, spec: PGDSpec, attack_bn: str) -> None:
        if spec.norm != "linf":
            raise UserError(
                f"method dyart searches the boundary under linf, got --norm {spec.norm}; leave it out"
            )
        if attack_bn != "eval":
            raise UserError(
                f"method dyart searches the boundary with --attack-bn eval, got {attack_bn}; leave it out"
            )
        self.search(spec)

    def search(self, spec: PGDSpec) -> BoundarySpec:
        """The search that goes with the run's attack. Raises UserError for numbers that cannot work."""
        return replace(self._search, steps=spec.steps, eps_start=spec.eps)

    def inner(self, nets: Networks, batch: Batch) -> Inner:
        return Inner(AttackGoal("margin", batch.labels))

    def perturb(self, nets: Networks, batch: Batch, inner: Inner, attack: Attacker) -> AttackResult:
        spec = self.search(attack.spec)
        search = partial(run_boundary, spec=spec)
        return attack.engine.captured(
            search, batch.x, batch.labels, key=spec, passes=spec.steps, draws=attack.draws
        )

    def outer(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Outer:
        points, options = cast(Boundary, attacked), self.options
        weights = self.weights(points)
        # The points come before the images, as in the release: running statistics depend on the order.
        margin = soft_margin(nets.model(points.x_adv), batch.labels, temperature=options.temperature)
        fit = self.fit(nets.model(batch.x), batch)
        loss = fit.loss - options.margin_weight * (weights * margin).sum() / len(batch.labels)
        found = points.found.sum()
        logs = {
            "loss": loss.detach(),
            "clean_loss": fit.loss.detach(),
            "train_acc": batch_share(fit.target_correct, batch),
            **logged_mean("boundary_distance", points.distance, points.found),
            "boundary_found": batch_share(found, batch),
            "boundary_usable": batch_share(points.usable.sum(), batch),
            "boundary_near": batch_share((points.found & (points.distance < self._r0)).sum(), batch),
        }
        return Outer({"model": loss}, logs)

    def weights(self, points: Boundary) -> Tensor:
        """w of the module's text, (N,), constant."""
        good = points.usable if self.options.quality_filter else points.found & (points.grad_norm > 0)
        counts = good & (points.distance < self._r0)
        return torch.where(counts, torch.exp(-self.options.decay * points.distance) / points.grad_norm, 0.0)
