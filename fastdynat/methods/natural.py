"""Natural training: the control without an attack."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from fastdynat.attacks import wide
from fastdynat.data import Batch
from fastdynat.methods.base import Inner, Method, Networks, Outer, share_correct


@dataclass(frozen=True, kw_only=True)
class NaturalOptions:
    """Natural training has no options of its own."""


class Natural(Method[NaturalOptions]):
    """``min CE(f(x), y)``."""

    name = "natural"
    options_type = NaturalOptions
    # It has no robust accuracy to speak of: by PGD a network at chance level would beat a trained one.
    select_by = "val_clean_acc"

    def inner(self, nets: Networks, batch: Batch) -> Inner:
        return Inner(goal=None)

    def outer(self, nets: Networks, batch: Batch, inner: Inner, x_adv: Tensor) -> Outer:
        logits = wide(nets.model(x_adv))
        loss = F.cross_entropy(logits, batch.labels)
        return Outer({"model": loss}, {"loss": loss.detach(), "train_acc": share_correct(logits, batch.labels)})
