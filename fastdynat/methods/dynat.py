"""DYNAT: dynamic-label adversarial training (arXiv 2408.13102).

Guide and model are trained together from scratch. The guide learns the true labels on clean images. Its
prediction on the clean batch, the dynamic label l, is what the model is attacked against and what it learns
on attacked images::

    l  = argmax f_g(x)             guide in train mode, no gradient
    x' = PGD on CE(f(.), l)        model in eval mode, start x + 0.001 N(0, I), the start is not projected
    guide:  min CE(f_g(x), y)
    model:  min beta * CE(f(x'), l)

The losses share no parameter and no gradient path. Under SGD, beta therefore scales the model's learning rate
(and divides its weight decay); it does not trade the model's loss against the guide's.

Details of the released code, and how they are treated here:

- it runs the clean batch through the model in train mode and discards the result. This pass gives the clean
  images 52.6 % of the running statistics that attack and evaluation use. Kept, after the attacked batch:
  `bn_clean_forward`.
- it evaluates the guide in every attack step. The label cannot change between steps (same batch, same
  weights, batch statistics), so one pass serves label and loss here. Only the guide's running statistics
  differ (1 update per batch, not 11); training uses them only if `guide_mode` is "eval".
- it accepts --beta, set to 6 in its script, and ignores it. Here `beta` weights the model's loss: 1 is the
  release's active line, 0.2 its commented one.

Variants, each a set of options:

- "no inner" is ``--inner-loss kl_self``.
- DYNAT-AWP as released is ``--inner-loss kl_self --extra-kl-weight 1 --beta 0.2 --awp 0.005 --awp-warmup 9
  --awp-objective trades``.
- `weighting` multiplies each image's cross-entropy by GAIRAT's or MAIL's weight under the dynamic labels. No
  such combination is published; `weighting.py` names the sources of both rules.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastdynat.attack_engine.goal import AttackGoal, kl_from_log_probs, wide
from fastdynat.attacks import AttackResult
from fastdynat.data import Batch
from fastdynat.errors import UserError
from fastdynat.methods import (
    AttackDefaults,
    Inner,
    Method,
    MethodOptions,
    Networks,
    Outer,
    check_given,
    check_numbers,
    check_positive,
    register_method,
)
from fastdynat.methods.building_blocks import batch_share, clean_statistics_pass, mean_kl
from fastdynat.methods.trades import kl_to_self
from fastdynat.methods.weighting import GAIRAT_FROM, MAIL_FROM, MailScale, gairat_weights, mail_weights
from fastdynat.ops import dynamic_label_cross_entropy

AWP_BETA = 6.0  # TRADES' beta in the released weight perturbation
# The label that the attack drives away from, where it is one that the weights may be about.
COUNTED = {"ce_dynamic": "dynamic", "kl_guide": "dynamic", "ce_true": "true"}
WEIGHT_FROM = {"gairat": GAIRAT_FROM, "mail": MAIL_FROM, "none": 0.0}


@dataclass(frozen=True, kw_only=True)
class DynatOptions(MethodOptions):
    """Options of DYNAT; the defaults are the released code's."""

    inner_loss: Literal["ce_dynamic", "ce_true", "kl_self", "kl_guide"] = "ce_dynamic"
    """The attack's objective: cross-entropy to the dynamic or the true label, KL from the model's own or the
    guide's clean prediction."""

    outer_label: Literal["dynamic", "true"] = "dynamic"
    """The labels of the model's loss on attacked images."""

    beta: float = 1.0
    """Weight of the model's loss; the release's alternative is 0.2."""

    label_type: Literal["hard", "soft"] = "hard"
    """Dynamic label: the guide's arg-max, or its softmax at `temperature`."""

    temperature: float = 1.0
    """Temperature of soft dynamic labels."""

    guide_mode: Literal["train", "eval"] = "train"
    """Batch norm statistics behind the guide's label: the batch's (train), or the guide's running ones (eval;
    costs one more guide pass)."""

    bn_clean_forward: bool = True
    """Update the model's running statistics with the clean batch after the attacked one."""

    extra_kl_weight: float = 0.0
    """Weight of KL(p(x) || p(x')) added to the model's loss, gradient through both arguments (1 in the AWP
    variant)."""

    awp_objective: Literal["own", "trades"] = "own"
    """The loss that --awp ascends: the model's own, or TRADES' with the true labels, as the release does."""

    weighting: Literal["none", "gairat", "mail"] = "none"
    """Weights of the images' cross-entropy."""

    weight_labels: Literal["dynamic", "true"] = "dynamic"
    """The labels with which the weights are computed."""

    weight_from: float | None = None
    """Share of the epochs after which the images are weighted; None is the published 0.5 (gairat) or 0.625
    (mail)."""

    lam: float = -1.0
    """gairat: lambda; a higher value makes the weights more equal."""

    slope: float = 10.0
    """mail: s."""

    bias: float = -0.5
    """mail: b."""

    weight_scale: MailScale = "released"
    """mail: factor of the weights, the code's 3 (released) or the one that makes their mean 1
    (normalized)."""

    def check(self) -> None:
        check_positive(self, "beta", "temperature")
        check_numbers(self, "extra_kl_weight")
        check_numbers(self, "lam", "slope", "bias", least=-math.inf)
        check_given(self, "weight_from", most=1.0)
        if self.weighting == "gairat" and COUNTED.get(self.inner_loss) != self.weight_labels:
            raise UserError(
                "weighting gairat counts the attack steps at which the prediction is still the "
                f"{self.weight_labels} label, but inner_loss {self.inner_loss} has no such label: "
                "use --inner-loss "
                f"{'ce_true' if self.weight_labels == 'true' else 'ce_dynamic'}"
            )

    def idle(self) -> dict[str, str]:
        found = {}
        if self.label_type == "hard":
            found["temperature"] = "needs --label-type soft"
        if self.extra_kl_weight > 0:
            found["bn_clean_forward"] = "--extra-kl-weight takes the clean batch through the model anyway"
        if self.weighting == "none":
            found |= dict.fromkeys(("weight_labels", "weight_from"), "needs --weighting gairat or mail")
        if self.weighting != "gairat":
            found["lam"] = "needs --weighting gairat"
        if self.weighting != "mail":
            found |= dict.fromkeys(("slope", "bias", "weight_scale"), "needs --weighting mail")
        return found


@register_method("dynat")
class Dynat(Method[DynatOptions]):
    """Dynamic-label adversarial training; `DynatOptions` has the variants."""

    options_type = DynatOptions
    smooths_labels = takes_mixed_labels = True
    uses_guide = True
    trains = ("model", "guide")
    attack_defaults = AttackDefaults(start="gaussian")

    def __init__(self, options: DynatOptions) -> None:
        super().__init__(options)
        normalized = options.weighting == "mail" and options.weight_scale == "normalized"
        self.couples_images = normalized or options.weighting == "gairat"
        self.takes_mixed_labels = options.weighting == "none" or options.weight_labels == "dynamic"

    def weighted(self) -> bool:
        """True if the images are weighted in this epoch."""
        return self.options.weighting != "none" and self.begun("weight_from")

    def begins(self) -> dict[str, float]:
        if self.options.weighting == "none":
            return {}
        given, published = self.options.weight_from, WEIGHT_FROM[self.options.weighting]
        return {"weight_from": published if given is None else given}

    def constants(self) -> tuple[float, ...]:
        return (self.weighted(),)

    def inner(self, nets: Networks, batch: Batch) -> Inner:
        assert nets.guide is not None
        assert nets.guide_eval is not None
        guide_logits = nets.guide(batch.x)
        # One pass over the guide's logits: its own loss and gradient, its accuracy, and the labels for the
        # model.
        guide = self.fit(guide_logits, batch)
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
        track = self.weighted() and self.options.weighting == "gairat"
        if self.options.inner_loss == "ce_dynamic":
            soft = dynamic_labels.dim() == 2
            probs = (dynamic_labels / self.options.temperature).softmax(1) if soft else dynamic_labels
            return AttackGoal("ce", probs, track=track)
        if self.options.inner_loss == "ce_true":
            return self.true_goal(batch, track=track)
        if self.options.inner_loss == "kl_guide":
            return AttackGoal("kl", label_logits.log_softmax(1), track=track)
        return kl_to_self(nets, batch)

    def outer(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Outer:
        assert inner.guide is not None
        assert inner.dynamic_labels is not None
        logits = nets.model(attacked.x_adv)
        guided = self.options.outer_label == "dynamic"
        hard = inner.dynamic_labels.argmax(1) if inner.dynamic_labels.dim() == 2 else inner.dynamic_labels
        weights = self.weights(
            logits, batch.labels if self.options.weight_labels == "true" else hard, attacked
        )
        if guided:
            fit = dynamic_label_cross_entropy(
                logits,
                inner.dynamic_labels,
                labels=batch.labels,
                weights=weights,
                soft=self.options.label_type == "soft",
                temperature=self.options.temperature,
                label_smoothing=self.label_smoothing,
            )
        else:
            fit = self.fit(logits, batch, weights=weights)
        loss = self.options.beta * fit.loss
        # The clean batch comes after the attacked one, as in the release: running statistics depend on the
        # order.
        if self.options.extra_kl_weight > 0:
            log_p_clean = wide(nets.model(batch.x)).log_softmax(1)
            loss = loss + self.options.extra_kl_weight * kl_from_log_probs(log_p_clean, wide(logits)).mean()
        elif self.options.bn_clean_forward:
            clean_statistics_pass(nets, batch)

        logs = {
            "loss": loss.detach(),
            "guide_loss": inner.guide.loss.detach(),
            "train_adv_acc": batch_share(fit.target_correct, batch),
            "guide_acc": batch_share(inner.guide.target_correct, batch),
            "label_agreement": batch_share(
                fit.guide_correct if guided else (hard == batch.labels).sum(), batch
            ),
        }
        return Outer({"model": loss}, logs)

    def weights(self, logits: Tensor, labels: Tensor, attacked: AttackResult) -> Tensor | None:
        """Per-image weights from the attacked images' `logits` and their `labels`, (N,); None is 1."""
        if not self.weighted():
            return None
        o = self.options
        if o.weighting == "gairat":
            return gairat_weights(attacked, o.lam)
        return mail_weights(logits, labels, slope=o.slope, bias=o.bias, scale=o.weight_scale)

    def awp_loss(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Tensor:
        if self.options.awp_objective == "own":
            return super().awp_loss(nets, batch, inner, attacked)
        clean, adv = nets.model(batch.x), nets.model(attacked.x_adv)
        return self.fit(clean, batch).loss + AWP_BETA * mean_kl(clean, adv)
