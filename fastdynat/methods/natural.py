"""Natural training: the control without an attack."""

from dataclasses import dataclass

from fastdynat.attacks import AttackResult
from fastdynat.data import Batch
from fastdynat.methods.base import Inner, Method, Networks, Outer, share
from fastdynat.ops import dynamic_label_cross_entropy


@dataclass(frozen=True, kw_only=True)
class NaturalOptions:
    """Natural training has no options of its own."""


class Natural(Method[NaturalOptions]):
    """``min CE(f(x), y)``."""

    name = "natural"
    options_type = NaturalOptions
    # It has no robust accuracy to speak of: by PGD a network at chance level would beat a trained one.
    select_by = "val_clean_acc"
    searches = False

    def inner(self, nets: Networks, batch: Batch) -> Inner:
        return Inner(goal=None)

    def outer(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Outer:
        fit = dynamic_label_cross_entropy(nets.model(attacked.x_adv), batch.labels, labels=batch.labels)
        return Outer({"model": fit.loss}, {"loss": fit.loss.detach(), "train_acc": share(fit.target_correct, batch)})
