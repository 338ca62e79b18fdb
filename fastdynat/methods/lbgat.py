"""LBGAT: learnable boundary guided adversarial training (Cui et al. 2021, arXiv 2011.11164).

A guide learns the true labels on clean images; the model matches on attacked images the guide's logits on
clean ones::

    x' = PGD on KL(p(x) || p(.))             model in eval mode, start x + 0.001 N(0, I)
    min  CE(f_g(x), y) + MSE(f(x'), f_g(x)) + alpha KL(p(x) || p(x'))

MSE is the mean over all N K logits. Its gradient reaches the guide too (nothing is detached), which makes the
boundary learnable. KL is summed over classes, averaged over the batch, with gradient through both arguments.
The true labels do not appear in the model's own losses.

Details of the released code, and how they are treated here:

- at alpha 0 it still runs the clean batch through the model in train mode, after the attacked batch. This
  updates the running statistics that attack and evaluation use. Kept: `bn_clean_forward`.
- its attack computes the clean prediction again in every step. It cannot change between steps; here it is
  computed once.
- its script trains beside a ResNet-18 guide, but the paper's rows for alpha 0 and 6 used a ResNet-152:
  --guide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

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
from fastdynat.methods.building_blocks import accuracy, batch_share, clean_statistics_pass, mean_kl
from fastdynat.methods.trades import kl_to_self


@dataclass(frozen=True, kw_only=True)
class LbgatOptions(MethodOptions):
    """Options of LBGAT; the defaults are the released code's."""

    alpha: float = 6.0
    """Weight of KL(p(x) || p(x')), called beta in the released code; published: 0 and 6."""

    alp_weight: float = 0.0
    """Weight of MSE(f(x'), f(x)) of the model's logits; the published ALP form is 1 at alpha 0."""

    freeze_guide: bool = False
    """Learn from a trained guide (--guide-from) that stays frozen and in eval mode: the paper's BGAT."""

    bn_clean_forward: bool = True
    """Where no loss needs the model's clean logits, still update its running statistics with the clean
    batch."""

    def check(self) -> None:
        check_numbers(self, "alpha", "alp_weight")

    def idle(self) -> dict[str, str]:
        clean = self.alpha > 0 or self.alp_weight > 0
        return (
            {"bn_clean_forward": "the loss takes the clean batch through the model anyway"} if clean else {}
        )


@register_method("lbgat")
class Lbgat(Method[LbgatOptions]):
    """Learnable boundary guided adversarial training; `LbgatOptions` has the variants."""

    options_type: ClassVar[type] = LbgatOptions
    smooths_labels = takes_mixed_labels = True
    uses_guide = True
    trains: tuple[str, ...] = ("model", "guide")
    attack_defaults = AttackDefaults(start="gaussian")

    def __init__(self, options: LbgatOptions) -> None:
        super().__init__(options)
        if options.freeze_guide:
            self.trains, self.smooths_labels = ("model",), False

    def inner(self, nets: Networks, batch: Batch) -> Inner:
        assert nets.guide is not None
        guide_logits = wide(nets.guide(batch.x))
        # The guide's own loss waits for `outer`: taking its gradient now would free the graph that the MSE
        # goes through.
        guide = self.fit(guide_logits, batch)
        return Inner(kl_to_self(nets, batch), guide, dynamic_labels=guide_logits)

    def outer(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Outer:
        assert inner.guide is not None
        assert inner.dynamic_labels is not None
        options = self.options
        # The clean batch comes after the attacked one, as in the release: running statistics depend on the
        # order.
        logits = wide(nets.model(attacked.x_adv))
        loss = self.match(logits, inner.dynamic_labels)
        if options.alpha > 0 or options.alp_weight > 0:
            clean = wide(nets.model(batch.x))
            if options.alpha > 0:
                loss = loss + options.alpha * mean_kl(clean, logits)
            if options.alp_weight > 0:
                loss = loss + options.alp_weight * F.mse_loss(logits, clean)
        elif options.bn_clean_forward:
            clean_statistics_pass(nets, batch)
        losses = {"model": loss} if options.freeze_guide else {"model": loss, "guide": inner.guide.loss}
        logs = {
            "loss": loss.detach(),
            "guide_loss": inner.guide.loss.detach(),
            "train_adv_acc": accuracy(logits, batch),
            "guide_acc": batch_share(inner.guide.target_correct, batch),
        }
        return Outer(losses, logs)

    def match(self, logits: Tensor, guide_logits: Tensor) -> Tensor:
        """Distance of the model's logits on attacked images from the guide's on clean ones."""
        return F.mse_loss(logits, guide_logits)
