"""Natural training: the control without an attack."""

from fastdynat.attack_engine.goal import wide
from fastdynat.attacks import AttackResult
from fastdynat.data import Batch
from fastdynat.methods.base import TRAINING_ATTACK, Inner, Method, Networks, Outer, share
from fastdynat.methods.options.plain import NaturalOptions
from fastdynat.ops import dynamic_label_cross_entropy


class Natural(Method[NaturalOptions]):
    """``min CE(f(x) / temperature, y)``."""

    name = "natural"
    options_type = NaturalOptions
    # It has no robust accuracy to speak of: by PGD a network at chance level would beat a trained one.
    select_by = "val_clean_acc"
    searches = False
    attacks = False
    unused_attack = TRAINING_ATTACK
    logs_adv_acc = False

    def inner(self, nets: Networks, batch: Batch) -> Inner:
        return Inner(goal=None)

    def outer(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Outer:
        logits = wide(nets.model(attacked.x_adv)) / self.options.temperature
        fit = dynamic_label_cross_entropy(logits, batch.labels, labels=batch.labels)
        return Outer(
            {"model": fit.loss}, {"loss": fit.loss.detach(), "train_acc": share(fit.target_correct, batch)}
        )
