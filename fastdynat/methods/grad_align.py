"""GradAlign: FGSM with aligned gradients (Andriushchenko & Flammarion, NeurIPS 2020, arXiv 2007.02617).

One step is as good as many where the loss is linear in the ball around an image. GradAlign adds what makes
it so: the gradients at two points of the ball should have one direction::

    g0   = grad CE(f(x0), y)                      x0: the image, or by --start a random point of the ball
    x'   = x0 + eps sign g0                       clipped to ball and box
    g    = grad CE(f(x + u), y)                   u uniform in the ball, x + u clipped to the box
    loss = CE(f(x'), y) + align_weight * mean(1 - cos(g0, g))

The mean is over the images of all processes whose gradients are not 0. As in the release and in
FastAT_Benchmark, g0 is a constant: the update differentiates g alone, by a second backward pass. Both
gradients are of the plain CE, which --label-smoothing leaves alone, and every pass is in train mode: three
passes per batch move the running statistics, and --attack-bn has no effect.

The benchmark starts from the image (the default; recipe fastat-gradalign). The release
(tml-epfl/understanding-fast-adv-training) starts as FGSM-RS does: --start uniform --step-size 10/255. Two
details differ from it: it does not clip x + u, and its g0 is 0 at the pixels that the clip of x0 has changed.

The passes of both gradients are never compiled: what torch.compile makes can be differentiated once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdynat.attack_engine.ascent import FP16_LOSS_SCALE
from fastdynat.attack_engine.engine import Attacker
from fastdynat.attack_engine.one_step_starts import TwoPoints
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attack_engine.steps import start_point
from fastdynat.attacks import AttackResult
from fastdynat.data import Batch
from fastdynat.execution.uncompiled import uncompiled
from fastdynat.methods import (
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
from fastdynat.methods.building_blocks import batch_share, check_linf, check_one_step, mean_over
from fastdynat.ops import attack_step_linf


@dataclass(frozen=True, kw_only=True)
class GradAlignOptions(MethodOptions):
    """Options of GradAlign."""

    align_weight: float = 0.2
    """Weight of the gradients' disagreement (the paper's lambda; 0.2 at eps 8/255 on CIFAR-10, more at larger
    radii)."""

    def check(self) -> None:
        check_numbers(self, "align_weight")


@register_method("grad_align")
class GradAlign(Method[GradAlignOptions]):
    """``min CE(f(x'), y) + align_weight mean(1 - cos(g0, g))``."""

    options_type = GradAlignOptions
    attack_defaults = AttackDefaults(start="none", steps=1, step_ratio=1.0)
    smooths_labels = takes_mixed_labels = True
    follows_ramp = True
    couples_images = True
    searches = False
    takes_any_attack = False
    unused_attack = ("attack_bn",)

    def check_attack(self, spec: PGDSpec, attack_bn: str) -> None:
        check_one_step(spec, "grad_align")
        check_linf(spec, "grad_align")

    def inner(self, nets: Networks, batch: Batch) -> Inner:
        return Inner(goal=None)

    def perturb(self, nets: Networks, batch: Batch, inner: Inner, attack: Attacker) -> TwoPoints:
        starts = [
            start_point(batch.x, kind, norm="linf", eps=attack.eps, generator=attack.draws)
            for kind in (attack.spec.start, "uniform")
        ]
        none = torch.zeros((), dtype=torch.int64, device=batch.x.device)
        return TwoPoints(starts[0].clamp(0, 1), none, 0, other=starts[1].clamp(0, 1), attack=attack)

    def outer(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Outer:
        assert isinstance(attacked, TwoPoints)
        size, eps = attacked.attack.step_size, attacked.attack.eps
        first = self._gradient(nets, attacked.x_adv, batch).detach()
        step = attack_step_linf(attacked.x_adv, first, batch.x, step_size=size, eps=eps)
        fit = self.fit(nets.model(step.x_adv), batch)
        apart, both = misalignment(first, self._gradient(nets, attacked.other, batch, differentiable=True))
        regularizer = mean_over(apart, both, batch)
        loss = fit.loss + self.options.align_weight * regularizer
        logs = {
            "loss": loss.detach(),
            **logged_mean("misalignment", apart, both),
            "train_adv_acc": batch_share(fit.target_correct, batch),
            "zero_grad_share": (~step.moved).double().mean(),
        }
        return Outer({"model": loss}, logs)

    def _gradient(self, nets: Networks, x: Tensor, batch: Batch, *, differentiable: bool = False) -> Tensor:
        """The gradient of the images' cross-entropies at `x`, up to a constant factor."""
        leaf = x.detach().requires_grad_()
        with uncompiled():
            value = self.true_goal(batch).per_image(nets.model(leaf)).sum()
        # Scaled, as it would underflow in half precision.
        return torch.autograd.grad(value * FP16_LOSS_SCALE, leaf, create_graph=differentiable)[0]


def misalignment(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """1 - cosine of the angle between two gradients of each image, (N,), and where neither of them is 0.

    The gradient of the disagreement is 0 where one of them is.
    """
    a, b = first.flatten(1), second.flatten(1)
    lengths = [vector.norm(dim=1) for vector in (a, b)]
    both = (lengths[0] > 0) & (lengths[1] > 0)
    product = torch.where(both, lengths[0] * lengths[1], 1.0)
    return 1 - (a * b).sum(1) / product, both
