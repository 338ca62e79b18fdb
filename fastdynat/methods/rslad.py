"""RSLAD: robust soft label adversarial distillation (Zi et al. 2021, arXiv 2108.07969).

The prediction of a frozen, robust guide on clean images is the label of every term; true labels are not
used::

    x' = PGD on KL(p_g(x) || p(.))          model in eval mode, start x + 0.001 N(0, I)
    min  attacked_weight KL(p_g(x) || p(x')) + clean_weight KL(p_g(x) || p(x))

Details of the released code, and how they are treated here:

- its KL is the mean over all N K entries on CIFAR-10, and ten times that on CIFAR-100: in both the sum over
  classes divided by 10. This is the default here for any K: `kl_mean`.
- it adds 1e-5 inside the logarithm of the guide's probabilities. That shifts the printed value by a constant
  and changes no gradient; here the KL is exact.
- the model sees the attacked batch before the clean one, both in train mode. Kept.

Published with 300 epochs, the rate falling by 10 at 215, 260 and 285: --epochs 300 --schedule multistep
--milestones 0.7166 0.8666 0.95.
"""

from __future__ import annotations

from dataclasses import dataclass

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
from fastdynat.methods.building_blocks import KlMean, accuracy, guide_logits, mean_kl


@dataclass(frozen=True, kw_only=True)
class RsladOptions(MethodOptions):
    """Options of RSLAD; the defaults are the released code's."""

    attacked_weight: float = 5 / 6
    """Weight of the KL on attacked images."""

    clean_weight: float = 1 / 6
    """Weight of the KL on clean images."""

    kl_mean: KlMean = "tenth"
    """Divisor of the KL, which is summed over K classes: 10 (tenth), K (entries), or nothing (batch)."""

    def check(self) -> None:
        check_numbers(self, "attacked_weight", "clean_weight")


@register_method("rslad")
class Rslad(Method[RsladOptions]):
    """Robust soft label adversarial distillation; the guide is a robust network."""

    options_type = RsladOptions
    takes_mixed_labels = True  # it uses no true label
    uses_guide = True
    guide_made_by = "madry"
    attack_defaults = AttackDefaults(start="gaussian")

    def inner(self, nets: Networks, batch: Batch) -> Inner:
        guide = guide_logits(nets, batch.x)
        return Inner(AttackGoal("kl", guide.log_softmax(1)), dynamic_labels=guide)

    def outer(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Outer:
        guide, options = inner.dynamic_labels, self.options
        assert guide is not None
        logits, clean = wide(nets.model(attacked.x_adv)), wide(nets.model(batch.x))
        loss = options.attacked_weight * mean_kl(guide, logits, mean=options.kl_mean)
        loss = loss + options.clean_weight * mean_kl(guide, clean, mean=options.kl_mean)
        logs = {
            "loss": loss.detach(),
            "train_acc": accuracy(clean, batch),
            "train_adv_acc": accuracy(logits, batch),
            "guide_acc": accuracy(guide, batch),
        }
        return Outer({"model": loss}, logs)
