"""ALP: adversarial logit pairing (Kannan et al. 2018, arXiv 1803.06373).

    min  1/2 CE(f(x), y) + 1/2 CE(f(x'), y) + logit_pairing * MSE(f(x), f(x')),   x' = PGD on CE(f(.), y)

The mean square is over images and classes; its gradient flows into both arguments. The paper's code is for
ImageNet and TensorFlow. The start (x + 0.001 N(0, I)), the factors 1/2 and the order of the passes are those
of the baseline of Pang et al. 2020 (AT_HE): the clean batch passes through the network before the attacked
one, and both update the running statistics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from fastdynat.attack_engine.goal import wide
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
from fastdynat.methods.building_blocks import batch_share


@dataclass(frozen=True, kw_only=True)
class AlpOptions(MethodOptions):
    """Options of adversarial logit pairing."""

    logit_pairing: float = 1.0
    """Weight of the mean squared difference of the logits (lambda of the paper); usual: 0.5 or 1."""

    def check(self) -> None:
        check_numbers(self, "logit_pairing")


@register_method("alp")
class Alp(Method[AlpOptions]):
    """``min 1/2 CE(f(x), y) + 1/2 CE(f(x'), y) + logit_pairing MSE(f(x), f(x'))``."""

    options_type = AlpOptions
    takes_targets = True
    smooths_labels = takes_mixed_labels = True
    attack_defaults = AttackDefaults(start="gaussian")

    def inner(self, nets: Networks, batch: Batch) -> Inner:
        return Inner(self.true_goal(batch))

    def outer(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Outer:
        clean, adv = nets.model(batch.x), nets.model(attacked.x_adv)
        fits = [self.fit(logits, batch) for logits in (clean, adv)]
        pairing = F.mse_loss(wide(clean), wide(adv))
        loss = 0.5 * fits[0].loss + 0.5 * fits[1].loss + self.options.logit_pairing * pairing
        accuracies = [batch_share(fit.target_correct, batch) for fit in fits]
        return Outer(
            {"model": loss},
            {"loss": loss.detach(), "train_acc": accuracies[0], "train_adv_acc": accuracies[1]},
        )
