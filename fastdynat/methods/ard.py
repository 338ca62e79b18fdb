"""ARD: adversarially robust distillation (Goldblum et al. 2020, arXiv 1905.09747).

The model learns on attacked images what a frozen, robust guide predicts on the clean ones::

    x' = PGD on CE(f(.), y), uniform start
    min  alpha T^2 KL(softmax(f_g(x) / T) || softmax(f(x') / T)) + (1 - alpha) CE(f(x), y)

Details of the released code, and how they are treated here:

- its KL is torch's default mean over all N K entries, the divergence divided by K: `kl_mean`.
- at alpha 1 it still runs the clean batch through the model in train mode, after the attacked one. This
  updates the running statistics that evaluation uses. Kept: `bn_clean_forward`.
- it attacks the model in train mode, so every attack step updates the running statistics too: --attack-bn
  train. The default here is eval, as for every other method.
- its learning rate falls once, not twice: the drop at 150 of 200 epochs starts from the initial rate again.
  The code is --epochs 200 --schedule multistep --milestones 0.5, the paper --milestones 0.5 0.75.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastdynat.attack_engine.goal import wide
from fastdynat.attacks import AttackResult
from fastdynat.data import Batch
from fastdynat.methods import (
    Inner,
    Method,
    MethodOptions,
    Networks,
    Outer,
    check_numbers,
    check_positive,
    register_method,
)
from fastdynat.methods.building_blocks import KlMean, accuracy, clean_statistics_pass, guide_logits, mean_kl


@dataclass(frozen=True, kw_only=True)
class ArdOptions(MethodOptions):
    """Options of ARD; the defaults are the released code's."""

    alpha: float = 1.0
    """Weight of the distillation; 1 - alpha is that of the cross-entropy to the true labels on clean
    images."""

    temperature: float = 30.0
    """Divides the logits of guide and model in the distillation, which is multiplied by its square."""

    kl_mean: KlMean = "entries"
    """Divisor of the KL, which is summed over K classes: K (entries), 10 (tenth), or nothing (batch)."""

    bn_clean_forward: bool = True
    """At alpha 1, update the model's running statistics with the clean batch after the attacked one."""

    def check(self) -> None:
        check_numbers(self, "alpha", most=1.0)
        check_positive(self, "temperature")

    def idle(self) -> dict[str, str]:
        return (
            {"bn_clean_forward": "--alpha below 1 takes the clean batch through the model anyway"}
            if self.alpha < 1
            else {}
        )


@register_method("ard")
class Ard(Method[ArdOptions]):
    """Adversarially robust distillation; the guide is a robust network."""

    options_type = ArdOptions
    takes_targets = True
    smooths_labels = takes_mixed_labels = True
    uses_guide = True
    guide_made_by = "madry"

    def __init__(self, options: ArdOptions) -> None:
        super().__init__(options)
        self.smooths_labels = options.alpha < 1

    def inner(self, nets: Networks, batch: Batch) -> Inner:
        return Inner(self.true_goal(batch), dynamic_labels=guide_logits(nets, batch.x))

    def outer(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Outer:
        assert inner.dynamic_labels is not None
        alpha, temperature = self.options.alpha, self.options.temperature
        # The clean batch comes after the attacked one, as in the release: running statistics depend on the
        # order.
        logits = wide(nets.model(attacked.x_adv))
        distilled = mean_kl(inner.dynamic_labels, logits, temperature=temperature, mean=self.options.kl_mean)
        loss = alpha * temperature**2 * distilled
        if alpha < 1:
            loss = loss + (1 - alpha) * self.fit(nets.model(batch.x), batch).loss
        elif self.options.bn_clean_forward:
            clean_statistics_pass(nets, batch)
        logs = {
            "loss": loss.detach(),
            "train_adv_acc": accuracy(logits, batch),
            "guide_acc": accuracy(inner.dynamic_labels, batch),
        }
        return Outer({"model": loss}, logs)
