"""HAT: helper-based adversarial training (Rade & Moosavi-Dezfooli, ICLR 2022).

TRADES with a third term: on a helper image beyond the attacked one, the label is what a naturally trained
guide predicts on the attacked image::

    x' = PGD on KL(p(x) || p(.))            model in eval mode, start x + 0.001 N(0, I)
    y' = argmax f_g(x')                     frozen guide in eval mode
    min  CE(f(x), y) + beta KL(p(x) || p(x')) + helper_weight CE(f(x + helper_scale (x' - x)), y')

KL is summed over classes, averaged over the batch, with gradient through both arguments.

Details of the released code, reproduced here:

- helper images are not clipped: they leave [0, 1] and, at helper_scale 2, lie up to 2 eps from x.
- clean, attacked and helper batch pass through the model in train mode in this order, and each updates the
  running statistics that attack and evaluation use. At helper_weight 0 the helper batch still does.
- the guide's label is taken at x', not at the helper image.
- `--gamma 1` and no beta are its parser's defaults; those below are the paper's and its README's.

Published with 50 epochs of one-cycle to 0.21, its peak at a quarter, and Nesterov: --recipe hat.
"""

from __future__ import annotations

from dataclasses import dataclass

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
from fastdynat.methods.building_blocks import accuracy, batch_share, guide_logits, mean_kl
from fastdynat.methods.trades import kl_to_self
from fastdynat.ops import dynamic_label_cross_entropy


@dataclass(frozen=True, kw_only=True)
class HatOptions(MethodOptions):
    """Options of HAT; the defaults are the published ones for ResNet-18 on CIFAR-10."""

    beta: float = 2.5
    """Weight of KL(p(x) || p(x'))."""

    helper_weight: float = 0.5
    """Weight of the helper images' loss (gamma in the paper); 0 leaves TRADES."""

    helper_scale: float = 2.0
    """Distance of the helper image, in units of x' - x (h in the paper)."""

    def check(self) -> None:
        check_numbers(self, "beta", "helper_weight", "helper_scale")

    def idle(self) -> dict[str, str]:
        return {"helper_scale": "needs --helper-weight above 0"} if self.helper_weight == 0 else {}


@register_method("hat")
class Hat(Method[HatOptions]):
    """Helper-based adversarial training; the guide is a naturally trained network."""

    options_type = HatOptions
    smooths_labels = takes_mixed_labels = True
    uses_guide = True
    attack_defaults = AttackDefaults(start="gaussian")

    def inner(self, nets: Networks, batch: Batch) -> Inner:
        return Inner(kl_to_self(nets, batch))

    def outer(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Outer:
        fooled_into = guide_logits(nets, attacked.x_adv).argmax(1)
        x_helper = batch.x + self.options.helper_scale * (attacked.x_adv - batch.x)
        clean, logits = wide(nets.model(batch.x)), wide(nets.model(attacked.x_adv))
        helper = dynamic_label_cross_entropy(
            nets.model(x_helper), fooled_into, label_smoothing=self.label_smoothing
        )
        fit = self.fit(clean, batch)
        loss = (
            fit.loss + self.options.beta * mean_kl(clean, logits) + self.options.helper_weight * helper.loss
        )
        logs = {
            "loss": loss.detach(),
            "train_acc": batch_share(fit.target_correct, batch),
            "train_adv_acc": accuracy(logits, batch),
            "guide_fooled": (fooled_into != batch.labels).float().mean(),
        }
        return Outer({"model": loss}, logs)
