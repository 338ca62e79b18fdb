"""VAT: virtual adversarial training (Miyato et al. 2018, arXiv 1704.03976), smoothness that needs no labels.

    r    = radius * g / ||g||_2,   g = grad_d KL(p(x) || p(x + d)) at d = xi * (a random unit vector)
    loss = CE(f(x), y) + vat_weight * KL(sg[p(x)] || p(x + r))

Every pass is in train mode; those of perturbed images leave the running statistics alone, as in the released
code. Images without a label (`UNLABELLED`; ``--labelled N``) take part in the second term only. For
robustness under L-inf use ``--search pgd``: x + r then comes from PGD on the same divergence, and the second
term is TRADES' regulariser without a gradient through p(x).

Two sizes differ from the released ones, for images in [0, 1]: its radius of 8 is in units of whitened images,
and its xi of 1e-6 moves each pixel by less than float32 resolves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastdynat.attack_engine.engine import Attacker
from fastdynat.attack_engine.goal import AttackGoal, kl_from_log_probs, soft_cross_entropy, wide
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attacks import AttackResult
from fastdynat.data import Batch
from fastdynat.errors import UserError
from fastdynat.methods import (
    MOST,
    TRAINING_ATTACK,
    AttackDefaults,
    Inner,
    Method,
    MethodOptions,
    Networks,
    Outer,
    check_numbers,
    logged_mean,
    register_method,
)
from fastdynat.methods.building_blocks import mean_over
from fastdynat.methods.trades import kl_to_self
from fastdynat.ops import Size
from fastdynat.ops.image_draws import normal_like

MOST_ITERATIONS = 10_000


@dataclass(frozen=True, kw_only=True)
class VatOptions(MethodOptions):
    """Options of virtual adversarial training."""

    vat_weight: float = 1.0
    """Weight of the divergence (the paper's alpha)."""

    radius: float | None = None
    """L2 length of the perturbation, in pixel units; None is eps under l2, and under linf the distance of the
    ball's corners, eps sqrt(C H W). Required under l1."""

    xi: float = 0.1
    """L2 length of the finite difference that finds the direction."""

    power_iterations: int = 1
    """Iterations of the power method."""

    search: Literal["power", "pgd"] = "power"
    """Where the perturbation comes from: the power method (the paper's), or PGD on the divergence under the
    run's norm."""

    def check(self) -> None:
        check_numbers(self, "vat_weight")
        for name in ("radius", "xi"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= MOST:
                raise UserError(f"{name} must be above 0 (L2, pixel units), got {value:g}")
        if not 1 <= self.power_iterations <= MOST_ITERATIONS:
            raise UserError(
                f"power_iterations must be >= 1 and at most {MOST_ITERATIONS}, got {self.power_iterations}"
            )

    def idle(self) -> dict[str, str]:
        return (
            dict.fromkeys(("radius", "xi", "power_iterations"), "needs --search power")
            if self.search == "pgd"
            else {}
        )


@register_method("vat")
class Vat(Method[VatOptions]):
    """``min CE(f(x), y) + weight KL(sg[p(x)] || p(x + r))``, equations 5 to 8 of the paper."""

    options_type = VatOptions
    follows_ramp = True
    smooths_labels = takes_mixed_labels = True
    attack_defaults = AttackDefaults(start="gaussian")
    semi_supervised = True
    couples_images = True
    logs_adv_acc = False

    def __init__(self, options: VatOptions) -> None:
        super().__init__(options)
        if options.search == "power":
            self.unused_attack = TRAINING_ATTACK
            self.follows_ramp = options.radius is None
            self.takes_any_attack = False

    def check_attack(self, spec: PGDSpec, attack_bn: str) -> None:
        if spec.norm == "l1" and self.options.search == "power" and self.options.radius is None:
            raise UserError(
                "vat takes its L2 length from eps, but under l1 eps is an L1 radius: give --radius, "
                "or use --search pgd or --norm l2"
            )

    def inner(self, nets: Networks, batch: Batch) -> Inner:
        return Inner(kl_to_self(nets, batch) if self.options.search == "pgd" else None)

    def perturb(self, nets: Networks, batch: Batch, inner: Inner, attack: Attacker) -> AttackResult:
        if inner.goal is not None:
            return attack(batch.x, inner.goal)
        # All passes in full precision: what half precision rounds is of the size of the difference that is
        # looked at.
        with torch.no_grad():
            divergence = AttackGoal("kl", wide(nets.unmoved(batch.x)).log_softmax(1))
        direction = _unit(_noise(batch.x, attack))
        zeros = torch.zeros((), dtype=torch.int64, device=batch.x.device)
        for _ in range(self.options.power_iterations):
            leaf = (batch.x + self.options.xi * direction).requires_grad_()
            (grad,) = torch.autograd.grad(divergence.per_image(nets.unmoved(leaf)).sum(), leaf)
            zeros = zeros + (grad.flatten(1) == 0).all(1).sum()
            direction = _unit(grad)
        x_adv = batch.x + self._radius(attack, batch.x) * direction
        return AttackResult(x_adv, zeros, len(batch.x) * self.options.power_iterations)

    def _per_image(self, log_probs: Tensor, batch: Batch) -> Tensor:
        """The cross-entropy with the labels, smoothed and mixed as in `fit`, (N,); any number without one."""
        if batch.mixed is None:
            hard = -log_probs.gather(1, batch.labels.clamp_min(0)[:, None]).squeeze(1)
        else:
            hard = soft_cross_entropy(log_probs, batch.mixed)
        smoothing = self.label_smoothing
        return hard if smoothing == 0 else (1 - smoothing) * hard - smoothing * log_probs.mean(1)

    def _radius(self, attack: Attacker, x: Tensor) -> Size:
        if self.options.radius is not None:
            return self.options.radius
        return attack.eps * math.sqrt(x[0].numel()) if attack.spec.norm == "linf" else attack.eps

    def outer(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Outer:
        log_probs = wide(nets.model(batch.x)).log_softmax(1)
        labelled = batch.labels >= 0
        # The mean over the images that have a label; where none has one, nothing.
        cross_entropy = mean_over(self._per_image(log_probs, batch), labelled, batch)
        divergence = kl_from_log_probs(log_probs.detach(), wide(nets.unmoved(attacked.x_adv))).mean()
        loss = cross_entropy + self.options.vat_weight * divergence
        logs = {
            "loss": loss.detach(),
            "divergence": divergence.detach(),
            **logged_mean("train_acc", log_probs.argmax(1) == batch.labels, labelled),
        }
        return Outer({"model": loss}, logs)


def _noise(x: Tensor, attack: Attacker) -> Tensor:
    """Standard normal numbers in the shape of `x`."""
    return torch.randn_like(x) if attack.draws is None else normal_like(x, attack.draws, *x.shape[1:])


def _unit(d: Tensor) -> Tensor:
    """`d` with L2 norm 1 per image; what is zero stays zero."""
    flat = d.flatten(1)
    flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(
        torch.finfo(d.dtype).tiny
    )  # squares of tiny entries underflow
    return (flat / flat.norm(dim=1, keepdim=True).clamp_min(torch.finfo(d.dtype).tiny)).view_as(d)
