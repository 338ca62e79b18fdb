"""PGD adversarial training (Madry et al. 2018, arXiv 1706.06083)."""

from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attacks import AttackResult
from fastdynat.data import Batch
from fastdynat.methods.base import (
    Inner,
    Method,
    Networks,
    Outer,
    clean_statistics_pass,
    share,
    statistics_pass,
)
from fastdynat.methods.options.plain import MadryOptions
from fastdynat.ops import dynamic_label_cross_entropy


class Madry(Method[MadryOptions]):
    """``min CE(f(x'), y)`` with x' from PGD on ``CE(f(.), y)``, equation 2.1 of the paper."""

    name = "madry"
    options_type = MadryOptions

    def inner(self, nets: Networks, batch: Batch) -> Inner:
        return Inner(AttackGoal("ce", batch.labels))

    def outer(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Outer:
        fit = dynamic_label_cross_entropy(nets.model(attacked.x_adv), batch.labels, labels=batch.labels)
        if self.options.bn_clean_forward:
            clean_statistics_pass(nets, batch)
        return Outer(
            {"model": fit.loss},
            {"loss": fit.loss.detach(), "train_adv_acc": share(fit.target_correct, batch)},
        )

    def after_attack(self, nets: Networks, batch: Batch, attacked: AttackResult) -> None:
        if self.options.bn_attack_forward:
            statistics_pass(nets, attacked.x_adv)

    def after_update(self, nets: Networks, batch: Batch) -> None:
        if self.options.bn_clean_after:
            clean_statistics_pass(nets, batch)
