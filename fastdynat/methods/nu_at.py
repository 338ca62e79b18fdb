"""NU-AT: nuclear norm adversarial training (Sriramanan et al., NeurIPS 2021), one step per batch.

With Z(x) the logits of the batch, an (N, K) matrix, and ||.||_* the sum of singular values::

    start   x0 = clip(x + noise eps s),  s random signs
    attack  x' = x0 + eps sign grad [CE(f(x0), y) + odd w ||Z(x) - Z(x0)||_*],  clipped to ball and box
    update  min CE(f(x), y) + w / N ||Z(x) - Z(x')||_*

odd is 1 in every second batch of an epoch, from the second one on, and 0 in the others; w is `nuc_max` times
the share of the epochs that are completed. The CE of the attack is summed over the images and smoothed by
--label-smoothing as that of the update.

Four passes per batch: x (in train mode, for the attack), x0 (in the mode of --attack-bn), x', x. Release and
benchmark differ in this:

- the release (val-iisc/NuAT) attacks in eval mode, does not smooth labels, has batches of 64, and its weight
  reaches 4.5 ten epochs before the end; for the weight-averaged form, NuAT-WA, 4 at the end.
- FastAT_Benchmark attacks in train mode (--attack-bn train), smooths labels by 0.4, has batches of 128 and a
  weight of up to 4: recipe fastat-nuat.

Both divide the nuclear norm by the batch size, the release by its full one in a partial batch too; here as in
the benchmark N is the number of images. The singular values are those of the whole batch, over all
processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from fastdynat.attack_engine.engine import Attacker
from fastdynat.attack_engine.goal import wide
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attack_engine.steps import pgd_step
from fastdynat.attacks import AttackResult
from fastdynat.data import Batch
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
from fastdynat.methods.building_blocks import accuracy, batch_share, check_linf, check_one_step
from fastdynat.methods.nuclear_norm import polar_factor
from fastdynat.ops.image_draws import uniform_like

if TYPE_CHECKING:  # the command line reads the options of methods without torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class NuAtOptions(MethodOptions):
    """Options of NU-AT; the defaults are those of FastAT_Benchmark."""

    nuc_max: float = 4.0
    """Weight of the nuclear norm after the last epoch; it grows from 0 by an equal amount per epoch."""

    noise: float = 0.5
    """Size of the random start, in units of eps: each pixel moves up or down by it."""

    def check(self) -> None:
        check_numbers(self, "nuc_max", "noise")


@dataclass(frozen=True)
class ComparedInner(Inner):
    """An inner problem that compares with the clean batch.

    Attributes:
        clean: logits (N, K) of the clean batch in train mode, without gradient.
    """

    clean: Tensor | None = None


@register_method("nu_at")
class NuAt(Method[NuAtOptions]):
    """``min CE(f(x), y) + w / N ||Z(x) - Z(x')||_*``."""

    options_type = NuAtOptions
    smooths_labels = takes_mixed_labels = True
    attack_defaults = AttackDefaults(steps=1, step_ratio=1.0)
    unused_attack = ("start",)
    takes_any_attack = False
    follows_ramp = True
    couples_images = True

    def check_attack(self, spec: PGDSpec, attack_bn: str) -> None:
        check_one_step(spec, "nu_at", "trades")
        check_linf(spec, "nu_at", "trades")

    def make_buffers(self, x: Tensor) -> dict[str, Tensor]:
        return {"nuclear_weight": x.new_zeros(())}  # a buffer: a captured step reads it anew

    def begin_epoch(self) -> None:
        self.buffers["nuclear_weight"].fill_(self.options.nuc_max * self.epoch / self.epochs)

    def constants(self) -> tuple[float, ...]:
        return (self._attacks_norm(),)

    def _attacks_norm(self) -> bool:
        """True if the attack of this batch increases the nuclear norm as well."""
        return self.epoch_step % 2 == 1

    def inner(self, nets: Networks, batch: Batch) -> Inner:
        with torch.no_grad():
            return ComparedInner(self.true_goal(batch), clean=wide(nets.model(batch.x)))

    def perturb(self, nets: Networks, batch: Batch, inner: Inner, attack: Attacker) -> AttackResult:
        signs = 1 - 2 * (uniform_like(batch.x, attack.draws, *batch.x.shape[1:]) > 0.5).to(batch.x.dtype)
        start = (batch.x + self.options.noise * attack.eps * signs).clamp(0, 1)
        clean, underflow = cast(ComparedInner, inner).clean, attack.engine.ascent.underflow
        assert clean is not None
        attack.engine.refresh()  # the clean pass has moved the running statistics
        attack.engine.prepare(start, 1)
        _, grad = attack.engine.value_and_grad(
            start, lambda logits: (underflow.scaled(self._logit_grad(logits, clean, batch), logits), None)
        )
        found = pgd_step(start, wide(grad), batch.x, norm="linf", step_size=attack.step_size, eps=attack.eps)
        return AttackResult(found.x_adv, (~found.moved).sum(), len(start))

    def _logit_grad(self, logits: Tensor, clean: Tensor, batch: Batch) -> Tensor:
        """The gradient of what the attack increases at the detached `logits` (N, K) of the start."""
        leaf = wide(logits).requires_grad_()
        (grad,) = torch.autograd.grad(len(leaf) * self.fit(leaf, batch).loss, leaf)
        if self._attacks_norm():
            grad = grad + self.buffers["nuclear_weight"] * polar_factor(leaf.detach() - clean)
        return grad

    def outer(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Outer:
        adv = wide(nets.model(attacked.x_adv))
        clean = nets.model(batch.x)
        fit, apart = self.fit(clean, batch), wide(clean) - adv
        norm = (apart * polar_factor(apart)).sum() / len(apart)
        loss = fit.loss + self.buffers["nuclear_weight"] * norm
        logs = {
            "loss": loss.detach(),
            "nuclear_norm": norm.detach(),
            "train_acc": batch_share(fit.target_correct, batch),
            "train_adv_acc": accuracy(adv, batch),
        }
        return Outer({"model": loss}, logs)
