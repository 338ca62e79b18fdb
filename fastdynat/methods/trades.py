"""TRADES: natural loss plus a bound on the robustness gap (Zhang et al. 2019, arXiv 1901.08573).

    min  CE(f(x), y) + beta KL(p(x) || p(x')),   x' = PGD on KL(p(x) || p(.)), start x + 0.001 N(0, I)

KL is summed over classes, averaged over the batch, with gradient through both arguments.

Details of the released code, and how they are treated here:

- its loss calls the network three times in train mode: clean, attacked, clean again. The third call computes
  what the first has computed, but updates the running statistics that attack and evaluation use, which end as
  0.729 r + 0.181 clean + 0.09 attacked and not as 0.81 r + 0.09 clean + 0.1 attacked. Kept, without gradient:
  `bn_third_pass`.
- it takes the KL from probabilities: NaN as soon as one underflows, at a logit gap of 104. Here it is taken
  from logits.
- it computes p(x) again in each attack step, with the same result in eval mode. Here it is computed once.
- with mixed labels (CutMix) it is the code of Wang et al. 2023 (DM-Improves-AT): the mixed label takes the
  place of p(x) in the attack's KL, whose gradient is then that of the cross-entropy, and of y in the first
  term; the second term keeps p(x). That release does not smooth mixed labels; here --label-smoothing does.
- with dropout, its third call draws another mask. Here the KL uses the first call's logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdynat.attack_engine.goal import AttackGoal, wide
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
from fastdynat.methods.building_blocks import accuracy, clean_statistics_pass, mean_kl


@dataclass(frozen=True, kw_only=True)
class TradesOptions(MethodOptions):
    """Options of TRADES; the defaults are the released code's."""

    beta: float = 6.0
    """Weight of the KL term, 1/lambda of the paper; usual: 1 to 10."""

    bn_third_pass: bool = True
    """Update the running statistics with the clean batch once more, after the attacked one."""

    def check(self) -> None:
        check_numbers(self, "beta")


@register_method("trades")
class Trades(Method[TradesOptions]):
    """``min CE(f(x), y) + beta KL(p(x) || p(x'))``."""

    options_type = TradesOptions
    smooths_labels = takes_mixed_labels = True
    attack_defaults = AttackDefaults(start="gaussian")

    def inner(self, nets: Networks, batch: Batch) -> Inner:
        return Inner(kl_to_self(nets, batch) if batch.mixed is None else self.true_goal(batch))

    def outer(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Outer:
        clean, adv = nets.model(batch.x), nets.model(attacked.x_adv)
        loss = self.fit(clean, batch).loss + self.options.beta * mean_kl(clean, adv)
        if self.options.bn_third_pass:
            clean_statistics_pass(nets, batch)
        logs = {
            "loss": loss.detach(),
            "train_acc": accuracy(clean, batch),
            "train_adv_acc": accuracy(adv, batch),
        }
        return Outer({"model": loss}, logs)

    def awp_loss(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Tensor:
        clean, adv = nets.model(batch.x), nets.model(attacked.x_adv)
        return self.fit(clean, batch).loss + self.options.beta * mean_kl(clean, adv)


def kl_to_self(nets: Networks, batch: Batch) -> AttackGoal:
    """``KL(p(x) || p(x'))``: away from the model's clean prediction, which is constant in the attack."""
    with torch.no_grad():
        return AttackGoal("kl", wide(nets.attacked(batch.x)).log_softmax(1))
