"""Defensive distillation (Papernot et al. 2016, arXiv 1511.04508): a control that looks robust and is not.

    min  CE(softmax(f_g(x) / T), softmax(f(x) / T))      on clean images; T is 1 at test time

The guide is a natural network trained at the same temperature: --method natural --temperature T. Training
uses no attack and, as in the paper, no factor T^2.

Logits become about T times larger. At T = 1 the softmax saturates and the gradient of the cross-entropy
underflows, so ordinary PGD makes no progress and reports robust accuracy: gradient masking, which `fastdynat
eval --checks` detects. An attack on the margin of the logits (--attacks cw) breaks it, as in Carlini & Wagner
2017, and so does the PGD of `fastdynat eval`, which rescales each image's gradient.
"""

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
from fastdynat.methods.building_blocks import accuracy, batch_share, guide_logits
from fastdynat.ops import dynamic_label_cross_entropy


@dataclass(frozen=True, kw_only=True)
class DistillationOptions(MethodOptions):
    """Options of defensive distillation."""

    temperature: float = 20.0
    """T of guide and model; the paper tries 1 to 100. The gradient is about T times smaller: raise --lr
    with it."""

    def check(self) -> None:
        check_positive(self, "temperature")


@register_method("distillation")
class Distillation(Method[DistillationOptions]):
    """Defensive distillation; the guide is a natural network trained at the same temperature."""

    options_type = DistillationOptions
    takes_mixed_labels = True  # it uses no true label
    uses_guide = True
    select_by = "val_clean_acc"
    searches = False
    attacks = False
    takes_any_attack = False
    unused_attack = TRAINING_ATTACK
    logs_adv_acc = False

    def __init__(self, options: DistillationOptions) -> None:
        super().__init__(options)
        self.guide_made_by = f"natural --temperature {options.temperature:g}"
        self.guide_settings = {"method": "natural", "temperature": options.temperature}

    def inner(self, nets: Networks, batch: Batch) -> Inner:
        return Inner(goal=None, dynamic_labels=guide_logits(nets, batch.x))

    def outer(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Outer:
        assert inner.dynamic_labels is not None
        logits, temperature = wide(nets.model(batch.x)), self.options.temperature
        fit = dynamic_label_cross_entropy(
            logits / temperature,
            inner.dynamic_labels,
            labels=batch.labels,
            soft=True,
            temperature=temperature,
        )
        logs = {
            "loss": fit.loss.detach(),
            "train_acc": batch_share(fit.target_correct, batch),
            "guide_acc": accuracy(inner.dynamic_labels, batch),
        }
        return Outer({"model": fit.loss}, logs)
