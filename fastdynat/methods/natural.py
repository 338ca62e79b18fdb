"""Natural training: cross-entropy on clean images, the control without an attack."""

from __future__ import annotations

from dataclasses import dataclass

from fastdynat.attack_engine.goal import wide
from fastdynat.attacks import AttackResult
from fastdynat.data import Batch
from fastdynat.methods import (
    TRAINING_ATTACK,
    Inner,
    Method,
    MethodOptions,
    Networks,
    Outer,
    check_positive,
    register_method,
)
from fastdynat.methods.building_blocks import batch_share


@dataclass(frozen=True, kw_only=True)
class NaturalOptions(MethodOptions):
    """Options of natural training."""

    temperature: float = 1.0
    """Divides the logits in the loss; above 1 it trains the guide of defensive distillation."""

    def check(self) -> None:
        check_positive(self, "temperature")


@register_method("natural")
class Natural(Method[NaturalOptions]):
    """``min CE(f(x) / temperature, y)``."""

    options_type = NaturalOptions
    smooths_labels = takes_mixed_labels = True
    # It has no robust accuracy to speak of: by PGD a network at chance level would beat a trained one.
    select_by = "val_clean_acc"
    searches = False
    attacks = False
    takes_any_attack = False
    unused_attack = TRAINING_ATTACK
    logs_adv_acc = False

    def inner(self, nets: Networks, batch: Batch) -> Inner:
        return Inner(goal=None)

    def outer(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Outer:
        logits = wide(nets.model(attacked.x_adv)) / self.options.temperature
        fit = self.fit(logits, batch)
        return Outer(
            {"model": fit.loss},
            {"loss": fit.loss.detach(), "train_acc": batch_share(fit.target_correct, batch)},
        )
