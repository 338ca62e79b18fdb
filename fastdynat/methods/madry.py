"""PGD adversarial training (Madry et al. 2018, arXiv 1706.06083)."""

from __future__ import annotations

from dataclasses import dataclass

from fastdynat.attacks import AttackResult
from fastdynat.data import Batch
from fastdynat.methods import Inner, Method, MethodOptions, Networks, Outer, register_method
from fastdynat.methods.building_blocks import batch_share, clean_statistics_pass, statistics_pass


@dataclass(frozen=True, kw_only=True)
class MadryOptions(MethodOptions):
    """Options of PGD adversarial training."""

    bn_clean_forward: bool = False
    """After the attacked batch, let the clean batch move the running statistics too (as DYNAT's release
    does)."""

    bn_attack_forward: bool = False
    """Before the update, let the attacked batch move the running statistics once more: the look at the
    attack's loss that the release of Rice et al. ends every attack with."""

    bn_clean_after: bool = False
    """After the update, let the clean batch move the running statistics: how that release measures its
    training accuracy."""


@register_method("madry")
class Madry(Method[MadryOptions]):
    """``min CE(f(x'), y)`` with x' from PGD on ``CE(f(.), y)``, equation 2.1 of the paper."""

    options_type = MadryOptions
    takes_targets = True
    smooths_labels = takes_mixed_labels = True

    def inner(self, nets: Networks, batch: Batch) -> Inner:
        return Inner(self.true_goal(batch))

    def outer(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Outer:
        fit = self.fit(nets.model(attacked.x_adv), batch)
        if self.options.bn_clean_forward:
            clean_statistics_pass(nets, batch)
        return Outer(
            {"model": fit.loss},
            {"loss": fit.loss.detach(), "train_adv_acc": batch_share(fit.target_correct, batch)},
        )

    def after_attack(self, nets: Networks, batch: Batch, attacked: AttackResult) -> None:
        if self.options.bn_attack_forward:
            statistics_pass(nets, attacked.x_adv)

    def after_update(self, nets: Networks, batch: Batch) -> None:
        if self.options.bn_clean_after:
            clean_statistics_pass(nets, batch)
