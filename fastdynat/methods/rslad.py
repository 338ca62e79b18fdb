"""RSLAD: robust soft label adversarial distillation (Zi et al. 2021, arXiv 2108.07969).

A frozen, robust teacher's prediction on clean images is the label for everything; no true label is used::

    x' = PGD on KL(p_g(x) || p_s(.))          student in eval mode, start x + 0.001 N(0, I)
    minimise attacked_weight KL(p_g(x) || p_s(x')) + clean_weight KL(p_g(x) || p_s(x))

Silent effects of the released code, and what is done with them here:

- its KL is the mean over all N K entries on CIFAR-10, and ten times that on CIFAR-100: the sum over classes
  divided by 10 in both. That is the default here for any K: `kl_mean`.
- it adds 1e-5 inside the logarithm of the teacher's probabilities. That changes the value it prints by a
  constant and no gradient; here the KL is exact.
- the student sees the attacked batch before the clean one, both in train mode; kept.

Published with 300 epochs, the rate falling by 10 at 215, 260 and 285:
--epochs 300 --schedule multistep --milestones 0.7166 0.8666 0.95.
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
    register,
)
from fastdynat.methods.building_blocks import KlMean, accuracy, mean_kl, teacher_logits


@dataclass(frozen=True, kw_only=True)
class RsladOptions(MethodOptions):
    """Options of RSLAD; the defaults are the released code's."""

    attacked_weight: float = 5 / 6
    """Weight of the KL on attacked images."""

    clean_weight: float = 1 / 6
    """Weight of the KL on clean images."""

    kl_mean: KlMean = "tenth"
    """What the KL, summed over K classes, is divided by: 10 (tenth), K (entries), or nothing (batch)."""

    def check(self) -> None:
        check_numbers(self, "attacked_weight", "clean_weight")


@register("rslad")
class Rslad(Method[RsladOptions]):
    """Robust soft label adversarial distillation; the guide is a robust teacher."""

    options_type = RsladOptions
    uses_guide = True
    guide_made_by = "madry"
    attack_defaults = AttackDefaults(start="gaussian")

    def inner(self, nets: Networks, batch: Batch) -> Inner:
        teacher = teacher_logits(nets, batch.x)
        return Inner(AttackGoal("kl", teacher.log_softmax(1)), dynamic_labels=teacher)

    def outer(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Outer:
        teacher, options = inner.dynamic_labels, self.options
        assert teacher is not None
        logits, clean = wide(nets.model(attacked.x_adv)), wide(nets.model(batch.x))
        loss = options.attacked_weight * mean_kl(teacher, logits, mean=options.kl_mean)
        loss = loss + options.clean_weight * mean_kl(teacher, clean, mean=options.kl_mean)
        logs = {
            "loss": loss.detach(),
            "train_acc": accuracy(clean, batch),
            "train_adv_acc": accuracy(logits, batch),
            "guide_acc": accuracy(teacher, batch),
        }
        return Outer({"model": loss}, logs)
