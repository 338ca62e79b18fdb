"""DYNAT: dynamic labels from a guide (arXiv 2408.13102).

Guide and model are trained together from scratch. The guide learns the true labels on clean images; its prediction on the clean
batch is the label against which the model is attacked and which it learns on the attacked images::

    l_nat = argmax f_g(x)                      from the guide's train-mode logits, no gradient
    x'    = PGD on CE(f_t(.), l_nat)           model in eval mode, start x + 0.001 N(0, I), no projection of the start
    guide minimises CE(f_g(x), y),   model minimises beta * CE(f_t(x'), l_nat)

The two losses share no parameter and no gradient path, so under SGD beta scales the model's learning rate (and divides its
weight decay) and trades nothing against the guide.

Silent effects of the released code, and what is done with them here:

- it runs the clean batch through the model in train mode although the result is unused; that second pass gives the clean images
  52.6 % of the running statistics that attack and evaluation use. Kept, after the attacked batch as there: `bn_clean_forward`.
- it evaluates the guide again in every attack step. The label cannot change between steps (same batch, same weights, batch
  statistics), so one pass serves label and guide loss. Only the guide's running statistics differ (1 update per batch, not
  11), and nothing reads them during training unless `guide_mode` is "eval".
- it accepts --beta and ignores it. Here `beta` weighs the model's loss; 1 is the release's active line, 0.2 its commented one.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastdynat.attacks import AttackGoal, AttackResult, kl_from_log_probs, wide
from fastdynat.data import Batch
from fastdynat.methods.base import AttackDefaults, Inner, Method, Networks, Outer, clean_statistics_pass, share
from fastdynat.methods.guidance import check_numbers, kl_to_self
from fastdynat.ops import dynamic_label_cross_entropy


@dataclass(frozen=True, kw_only=True)
class DynatOptions:
    """Options of DYNAT; the defaults are the released code's."""

    inner_loss: Literal["ce_dynamic", "ce_true", "kl_self", "kl_guide"] = "ce_dynamic"
    """What the attack maximises: cross-entropy to the dynamic or the true label, KL from the model's own or the guide's
    clean prediction."""

    outer_label: Literal["dynamic", "true"] = "dynamic"
    """What the model learns on attacked images."""

    beta: float = 1.0
    """Weight of the model's loss; the release's alternative is 0.2."""

    label_type: Literal["hard", "soft"] = "hard"
    """Dynamic label: the guide's arg-max, or its softmax at `temperature`."""

    temperature: float = 1.0
    """Temperature of soft dynamic labels."""

    guide_mode: Literal["train", "eval"] = "train"
    """Statistics with which the guide makes the label: the batch's, or its running ones (costs one more guide pass)."""

    bn_clean_forward: bool = True
    """Let the clean batch move the model's running statistics, after the attacked one."""

    extra_kl_weight: float = 0.0
    """Weight of KL(p(x) || p(x')) added to the model's loss, gradient through both arguments (1 in the AWP variant)."""


class Dynat(Method[DynatOptions]):
    """Dynamic-label adversarial training, `DynatOptions` for the variants."""

    name = "dynat"
    options_type = DynatOptions
    uses_guide = True
    trains = ("model", "guide")
    attack_defaults = AttackDefaults(start="gaussian")

    def __init__(self, options: DynatOptions) -> None:
        super().__init__(options)
        check_numbers(options, above_zero=("beta", "temperature"), at_least_zero=("extra_kl_weight",))

    def inner(self, nets: Networks, batch: Batch) -> Inner:
        assert nets.guide is not None
        assert nets.guide_eval is not None
        guide_logits = nets.guide(batch.x)
        # One pass over the guide's logits: its own loss and gradient, its accuracy, and the labels for the model.
        guide = dynamic_label_cross_entropy(guide_logits, batch.labels, labels=batch.labels)
        label_logits, hard = guide_logits.detach(), guide.predictions
        if self.options.guide_mode == "eval":
            with torch.no_grad():
                label_logits = nets.guide_eval(batch.x)
            hard = label_logits.argmax(1)
        dynamic_labels = hard if self.options.label_type == "hard" else wide(label_logits)
        goal = self.goal(nets, batch, wide(label_logits), dynamic_labels)
        return Inner(goal, guide, dynamic_labels, losses={"guide": guide.loss})

    def goal(self, nets: Networks, batch: Batch, label_logits: Tensor, dynamic_labels: Tensor) -> AttackGoal:
        """The inner objective; all of its targets are constants of the attack."""
        if self.options.inner_loss == "ce_dynamic":
            soft = dynamic_labels.dim() == 2
            return AttackGoal("ce", (dynamic_labels / self.options.temperature).softmax(1) if soft else dynamic_labels)
        if self.options.inner_loss == "ce_true":
            return AttackGoal("ce", batch.labels)
        if self.options.inner_loss == "kl_guide":
            return AttackGoal("kl", label_logits.log_softmax(1))
        return kl_to_self(nets, batch)

    def outer(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Outer:
        assert inner.guide is not None
        assert inner.dynamic_labels is not None
        logits = nets.model(attacked.x_adv)
        guided = self.options.outer_label == "dynamic"
        fit = dynamic_label_cross_entropy(
            logits,
            inner.dynamic_labels if guided else batch.labels,
            labels=batch.labels,
            soft=guided and self.options.label_type == "soft",
            temperature=self.options.temperature,
        )
        loss = self.options.beta * fit.loss
        # The clean batch comes after the attacked one, as in the release: running statistics depend on the order.
        if self.options.extra_kl_weight > 0:
            log_p_clean = wide(nets.model(batch.x)).log_softmax(1)
            loss = loss + self.options.extra_kl_weight * kl_from_log_probs(log_p_clean, wide(logits)).mean()
        elif self.options.bn_clean_forward:
            clean_statistics_pass(nets, batch)

        hard = inner.dynamic_labels.argmax(1) if inner.dynamic_labels.dim() == 2 else inner.dynamic_labels
        logs = {
            "loss": loss.detach(),
            "guide_loss": inner.guide.loss.detach(),
            "train_adv_acc": share(fit.target_correct, batch),
            "guide_acc": share(inner.guide.target_correct, batch),
            "label_agreement": share(fit.guide_correct if guided else (hard == batch.labels).sum(), batch),
        }
        return Outer({"model": loss}, logs)
