"""MART: misclassification-aware adversarial training (Wang et al., ICLR 2020).

    min  BCE(x', y) + beta KL(p(x) || p(x')) (1 - p_y(x)),   x' = PGD on CE(f(.), y), start x + 0.001 N(0, I)
    BCE(x', y) = -log p_y(x') - log(1 - max_{k != y} p_k(x'))

Details of the released code, and how they are treated here:

- the weight 1 - p_y(x) is not a constant: its gradient makes the network more confident on clean images.
  Kept.
- it takes -log(1.0001 - p), so the second half of BCE never exceeds 9.21 and its gradient vanishes for images
  that the attack turns with confidence, where the exact term is steepest. Exact by default; `floor` 0.0001 is
  the release's.
- it takes logarithms of probabilities plus 1e-12, which cuts the KL off where p(x') is smaller. Here all
  terms come from logits: exact, with a finite gradient for any gap.
- the clean batch passes through the network before the attacked one, which matters to running statistics.
  Kept.

Label smoothing is that of the first half of BCE, the cross-entropy; the second half and 1 - p_y are functions
of the class y. Mixed labels, which have no such class, are refused.

Released settings: beta 5, lr 0.01, weight decay 3.5e-3 (ResNet-18); beta 6, lr 0.1, weight decay 7e-4
(WRN-34-10).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastdynat.attack_engine.goal import kl_from_log_probs, rival_loss, wide
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
from fastdynat.methods.building_blocks import accuracy, batch_share


@dataclass(frozen=True, kw_only=True)
class MartOptions(MethodOptions):
    """Options of MART."""

    beta: float = 6.0
    """Weight of the KL term; the released scripts have 5 (ResNet-18) and 6 (WRN-34-10)."""

    floor: float = 0.0
    """Added to 1 - max p_k in the second half of BCE, to bound it; the release has 0.0001, the formula 0."""

    def check(self) -> None:
        check_numbers(self, "beta", "floor")


@register_method("mart")
class Mart(Method[MartOptions]):
    """``min BCE(x', y) + beta KL(p(x) || p(x')) (1 - p_y(x))``."""

    options_type = MartOptions
    takes_targets = True
    smooths_labels = True
    attack_defaults = AttackDefaults(start="gaussian")

    def inner(self, nets: Networks, batch: Batch) -> Inner:
        return Inner(self.true_goal(batch))

    def outer(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Outer:
        clean, adv = nets.model(batch.x), nets.model(attacked.x_adv)
        fit = self.fit(adv, batch)
        log_p = wide(clean).log_softmax(1)
        wrong = -torch.expm1(log_p.gather(1, batch.labels[:, None]).squeeze(1))  # 1 - p_y(x)
        robust = (kl_from_log_probs(log_p, wide(adv)) * wrong).mean()
        loss = (
            fit.loss
            + rival_loss(wide(adv), batch.labels, self.options.floor).mean()
            + self.options.beta * robust
        )
        adv_acc = batch_share(fit.target_correct, batch)
        return Outer(
            {"model": loss},
            {"loss": loss.detach(), "train_acc": accuracy(clean, batch), "train_adv_acc": adv_acc},
        )
