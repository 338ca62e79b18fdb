"""Natural training: the control without an attack."""

from dataclasses import dataclass

from fastdynat.attacks import AttackResult, wide
from fastdynat.data import Batch
from fastdynat.methods.base import Inner, Method, Networks, Outer, check_positive, share
from fastdynat.ops import dynamic_label_cross_entropy


@dataclass(frozen=True, kw_only=True)
class NaturalOptions:
    """Options of natural training."""

    temperature: float = 1.0
    """Divides the logits in the loss; above 1 it makes the teacher of defensive distillation."""


class Natural(Method[NaturalOptions]):
    """``min CE(f(x) / temperature, y)``."""

    name = "natural"
    options_type = NaturalOptions
    # It has no robust accuracy to speak of: by PGD a network at chance level would beat a trained one.
    select_by = "val_clean_acc"
    searches = False
    logs_adv_acc = False

    def __init__(self, options: NaturalOptions) -> None:
        super().__init__(options)
        check_positive(options, "temperature")

    def inner(self, nets: Networks, batch: Batch) -> Inner:
        return Inner(goal=None)

    def outer(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Outer:
        logits = wide(nets.model(attacked.x_adv)) / self.options.temperature
        fit = dynamic_label_cross_entropy(logits, batch.labels, labels=batch.labels)
        return Outer({"model": fit.loss}, {"loss": fit.loss.detach(), "train_acc": share(fit.target_correct, batch)})
