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
- with dropout, its third call draws another mask. Here the KL uses the first call's logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdynat.attack_engine.goal import AttackGoal, kl_from_log_probs, wide
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
from fastdynat.methods.building_blocks import accuracy, clean_statistics_pass
from fastdynat.ops import dynamic_label_cross_entropy


@dataclass(frozen=True, kw_only=True)
class TradesOptions(MethodOptions):
    """Options of TRADES; the defaults are the released code's."""

    beta: float = 6.0
    """Weight of the KL term, 1/lambda of the paper; usual: 1 to 10."""

    bn_third_pass: bool = True
    """Let the clean batch move the running statistics once more, after the attacked one."""

    def check(self) -> None:
        check_numbers(self, "beta")


@register_method("trades")
class Trades(Method[TradesOptions]):
    """``min CE(f(x), y) + beta KL(p(x) || p(x'))``."""

    options_type = TradesOptions
    attack_defaults = AttackDefaults(start="gaussian")

    def inner(self, nets: Networks, batch: Batch) -> Inner:
        return Inner(kl_to_self(nets, batch))

    def outer(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Outer:
        clean, adv = nets.model(batch.x), nets.model(attacked.x_adv)
        loss = trades_loss_from_logits(clean, adv, batch.labels, self.options.beta)
        if self.options.bn_third_pass:
            clean_statistics_pass(nets, batch)
        logs = {
            "loss": loss.detach(),
            "train_acc": accuracy(clean, batch),
            "train_adv_acc": accuracy(adv, batch),
        }
        return Outer({"model": loss}, logs)

    def awp_loss(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Tensor:
        return trades_loss_from_logits(
            nets.model(batch.x), nets.model(attacked.x_adv), batch.labels, self.options.beta
        )


def kl_to_self(nets: Networks, batch: Batch) -> AttackGoal:
    """``KL(p(x) || p(x'))``: away from the model's clean prediction, which is constant in the attack."""
    with torch.no_grad():
        return AttackGoal("kl", wide(nets.attacked(batch.x)).log_softmax(1))


def trades_loss_from_logits(
    clean: Tensor, attacked: Tensor, labels: Tensor, beta: float, weights: Tensor | None = None
) -> Tensor:
    """``CE(clean, labels) + beta mean(weights * KL(p_clean || p_attacked))``, a scalar.

    Args:
        clean, attacked: logits (N, K); gradient flows into both.
        labels: (N,) int64.
        weights: (N,) constants; None is 1.
    """
    kl = kl_from_log_probs(wide(clean).log_softmax(1), wide(attacked))
    weighted = kl if weights is None else weights.to(kl.dtype) * kl
    return dynamic_label_cross_entropy(clean, labels).loss + beta * weighted.mean()
