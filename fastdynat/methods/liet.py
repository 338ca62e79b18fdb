"""LIET: label information elimination (Pan et al., ICCV 2025), one step per batch from what labels suggest.

A network trained by single steps soon reads the label from the perturbation. LIET takes that information
away: it starts from what the network associates with the label, partly replaced by noise, and keeps the
predictions before and after the step alike::

    d_k   = eps sign grad CE(f(grey image), k)        one image per class, every `refresh` batches, eval mode
    x0    = clip(x +- mask(d_y, noise))               noise, uniform in the ball, at a share r of the pixels
    x'    = x0 + eps sign grad CE(f(x0), y)           clipped to ball and box
    loss  = CE(f(x'), y) + consistency (e + 1) / epochs * JS(p(x0), p(x'))

r is uniform in [`least_noise`, `most_noise`] and the sign a coin flip, both once per batch of all processes;
e counts completed epochs; JS is the Jensen-Shannon divergence, averaged over the batch. With
--label-smoothing S, the label's class has 1 - S of the probability, and each CE spreads S anew, at random,
over the other classes.

The pass of x0 is that of the update: its graph is kept, so a batch costs two passes forward, both in train
mode. Release (fzjcdt/LIET) and FastAT_Benchmark agree but for `refresh`, on CIFAR-10 10 and 20. Above 8/255
both draw noise from twice the ball and do not project x' onto the ball; so does this (`is_large`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdynat.attack_engine.ascent import FP16_LOSS_SCALE
from fastdynat.attack_engine.engine import Attacker
from fastdynat.attack_engine.goal import soft_cross_entropy, wide
from fastdynat.attack_engine.one_step_starts import LabelStart
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attacks import AttackResult
from fastdynat.data import Batch
from fastdynat.errors import UserError
from fastdynat.methods import (
    AttackDefaults,
    Inner,
    Method,
    MethodOptions,
    Networks,
    Outer,
    check_numbers,
    register_method,
)
from fastdynat.methods.building_blocks import accuracy, check_linf, check_one_step
from fastdynat.ops import attack_step_linf
from fastdynat.ops.image_draws import uniform_like
from fastdynat.units import describe_size

LARGE = 8  # levels of 8-bit pixels; radii above have twice the noise and no projection
MOST_BATCHES = 10_000


@dataclass(frozen=True, kw_only=True)
class LietOptions(MethodOptions):
    """Options of LIET; the defaults are those of FastAT_Benchmark for CIFAR-10."""

    consistency: float = 100.0
    """Weight of the divergence in the last epoch (the release's lambda); it grows in equal steps."""

    least_noise: float = 0.1
    """Smallest share of the pixels' values that noise replaces."""

    most_noise: float = 0.5
    """Largest such share."""

    refresh: int = 20
    """Number of batches after which the perturbation that the network associates with each class is computed
    anew."""

    def check(self) -> None:
        check_numbers(self, "consistency")
        check_numbers(self, "least_noise", "most_noise", most=1.0)
        if self.least_noise > self.most_noise:
            raise UserError(
                f"least_noise must be at most most_noise ({self.most_noise:g}), got {self.least_noise:g}"
            )
        if not 1 <= self.refresh <= MOST_BATCHES:
            raise UserError(f"refresh must be >= 1 and at most {MOST_BATCHES} batches, got {self.refresh}")


@register_method("liet")
class Liet(Method[LietOptions]):
    """``min CE(f(x'), y) + weight JS(p(x0), p(x'))``."""

    options_type = LietOptions
    smooths_labels = True
    attack_defaults = AttackDefaults(steps=1, step_ratio=1.0)
    unused_attack = ("start",)
    takes_any_attack = False
    follows_ramp = True
    searches = False
    retains_graph = True

    def check_attack(self, spec: PGDSpec, attack_bn: str) -> None:
        check_one_step(spec, "liet")
        check_linf(spec, "liet")
        if attack_bn != "eval":
            raise UserError(
                f"liet attacks in the update's own passes, in train mode; its class perturbations need "
                f"--attack-bn eval, got {attack_bn}; leave it out"
            )

    def notes(self, spec: PGDSpec) -> list[str]:
        if not is_large(spec.eps):
            return []
        return [
            f"liet at eps {describe_size(spec.eps)}, above 8/255, takes its large form, as the release does: "
            "noise from twice the ball, and attacked images that may leave the ball"
        ]

    def make_buffers(self, x: Tensor) -> dict[str, Tensor]:
        return {
            "class_signs": x.new_zeros(self.num_classes, *x.shape[1:]),
            "consistency": x.new_zeros(()),  # a buffer: a captured step reads it anew
        }

    def begin_epoch(self) -> None:
        self.buffers["consistency"].fill_(self.options.consistency * (self.epoch + 1) / self.epochs)

    def constants(self) -> tuple[float, ...]:
        return (self._refreshes(),)

    def _refreshes(self) -> bool:
        return self.epoch_step % self.options.refresh == 0

    def inner(self, nets: Networks, batch: Batch) -> Inner:
        return Inner(goal=None)

    def perturb(self, nets: Networks, batch: Batch, inner: Inner, attack: Attacker) -> LabelStart:
        if self._refreshes():
            self._look_at_classes(nets, attack)
        start, none = self._start(batch, attack), torch.zeros((), dtype=torch.int64, device=batch.x.device)
        targets = [self._targets(batch, attack) for _ in range(2)]
        return LabelStart(start, none, 0, start_targets=targets[0], targets=targets[1], attack=attack)

    def _look_at_classes(self, nets: Networks, attack: Attacker) -> None:
        """Store the signs of the gradients at a grey image of each class."""
        signs = self.buffers["class_signs"]
        drawn = _shared(attack, signs, len(signs), len(signs))
        targets = spread(torch.arange(len(signs), device=signs.device), drawn, self.label_smoothing)
        grey = torch.full_like(signs, 0.5).requires_grad_()
        (grad,) = torch.autograd.grad(_summed(nets.attacked(grey), targets), grey)
        signs.copy_(grad.sign())

    def _start(self, batch: Batch, attack: Attacker) -> Tensor:
        """x0 of the module's text."""
        x, options = batch.x, self.options
        masked = uniform_like(x, attack.draws, *x.shape[1:])
        width = 2 if is_large(attack.spec.eps) else 1
        noise = width * attack.eps * (2 * uniform_like(x, attack.draws, *x.shape[1:]) - 1)
        share, coin = _shared(attack, x, 2)
        share = options.least_noise + (options.most_noise - options.least_noise) * share
        delta = torch.where(
            masked < share, noise, attack.eps * self.buffers["class_signs"].index_select(0, batch.labels)
        )
        return torch.where(coin < 0.5, x - delta, x + delta).clamp(0, 1)

    def _targets(self, batch: Batch, attack: Attacker) -> Tensor:
        """The labels of `batch` as probabilities (N, K), smoothed anew."""
        drawn = uniform_like(batch.x, attack.draws, self.num_classes)
        return spread(batch.labels, drawn, self.label_smoothing)

    def outer(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Outer:
        assert isinstance(attacked, LabelStart)
        leaf, spec = attacked.x_adv.detach().requires_grad_(), attacked.attack.spec
        before = nets.model(leaf)
        (grad,) = torch.autograd.grad(_summed(before, attacked.start_targets), leaf, retain_graph=True)
        eps = 1.0 if is_large(spec.eps) else attacked.attack.eps
        step = attack_step_linf(leaf, grad, batch.x, step_size=attacked.attack.step_size, eps=eps)

        logits = wide(nets.model(step.x_adv))
        divergence = jensen_shannon(wide(before), logits).mean()
        fit = soft_cross_entropy(logits, attacked.targets).mean()
        loss = fit + self.buffers["consistency"] * divergence
        logs = {
            "loss": loss.detach(),
            "divergence": divergence.detach(),
            "train_adv_acc": accuracy(logits, batch),
            "zero_grad_share": (~step.moved).double().mean(),
        }
        return Outer({"model": loss}, logs)


def is_large(eps: float) -> bool:
    """True above 8/255, to a tenth of a level: 0.031373 and a float32's 8/255, a little above it, are meant
    to be 8/255."""
    return round(255 * eps, 1) > LARGE


def _summed(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy over the images, scaled: its gradient does not underflow in half precision."""
    return soft_cross_entropy(wide(logits), targets).sum() * FP16_LOSS_SCALE


def spread(labels: Tensor, drawn: Tensor, smoothing: float) -> Tensor:
    """(N, K) probabilities: 1 - S of the label's class, the rest in proportion to `drawn` (N, K)."""
    own = torch.zeros_like(drawn).scatter_(1, labels[:, None], 1.0)
    others = drawn.masked_fill(own.bool(), 0.0)
    total = others.sum(1, keepdim=True).clamp_min(torch.finfo(drawn.dtype).tiny)
    return (1 - smoothing) * own + smoothing * others / total


def jensen_shannon(a: Tensor, b: Tensor) -> Tensor:
    """The Jensen-Shannon divergence of softmax(a) and softmax(b), (N,), with gradient through both."""
    log_p, log_q = a.log_softmax(1), b.log_softmax(1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(1) / 2


def _shared(attack: Attacker, like: Tensor, *shape: int) -> Tensor:
    """(*shape) uniform in [0, 1), equal on all processes."""
    if attack.draws is None:
        return torch.rand(*shape, dtype=like.dtype, device=like.device)
    return attack.draws.shared_uniform(*shape, dtype=like.dtype)
