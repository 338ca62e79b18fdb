"""MAIL: margin-aware instance reweighting learning (Liu et al. 2021, arXiv 2106.07904).

    base at:      min  mean w_i CE(f(x'_i), y_i),                          x' = PGD on CE(f(.), y)
    base trades:  min  CE(f(x), y) + beta mean w_i KL(p(x_i) || p(x'_i)),  x' = PGD on KL(p(x) || p(.))
    w_i = 3 sigmoid(slope (m_i + bias)),   m_i = max_{k != y} p_k(x'_i) - p_y(x'_i)

The weights follow the probabilistic margin m of the attacked image. Both attacks start at x + 0.001 N(0, I).
The base MART of the paper is not implemented.

Details of the released code, and how they are treated here:

- it multiplies by 3 where the paper divides by the batch's mean, so the weights do not have mean 1 and the
  loss changes its size when they begin: `weight_scale`.
- the weights begin after epoch 75 of 120, by loading the weights of the unweighted run (a file of epoch 70)
  and restarting the optimiser without its momentum. Here they begin at `weight_from` of one run, which keeps
  both.
- the base trades has two passes in train mode, clean and attacked, and not the three of TRADES' own code.
- it supports data of ten classes only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fastdynat.attacks import AttackResult
from fastdynat.data import Batch
from fastdynat.methods import (
    AttackDefaults,
    Inner,
    Method,
    MethodOptions,
    Networks,
    Outer,
    check_given,
    check_numbers,
    register_method,
)
from fastdynat.methods.building_blocks import accuracy, mean_kl
from fastdynat.methods.trades import kl_to_self
from fastdynat.methods.weighting import MAIL_FROM, MailScale, mail_weights

PUBLISHED = {"at": (10.0, -0.5), "trades": (2.0, 0.0)}  # slope, bias


@dataclass(frozen=True, kw_only=True)
class MailOptions(MethodOptions):
    """Options of MAIL; the defaults are the released code's."""

    base: Literal["at", "trades"] = "at"
    """The loss that is weighted."""

    slope: float | None = None
    """s of the weights; None is the published 10 (at) or 2 (trades)."""

    bias: float | None = None
    """b of the weights; None is the published -0.5 (at) or 0 (trades)."""

    weight_scale: MailScale = "released"
    """Factor of the weights: the code's 3 (released), or the one that makes their mean 1 (normalized)."""

    weight_from: float = MAIL_FROM
    """Share of the epochs after which the images are weighted."""

    beta: float = 5.0
    """Weight of the KL term of the trades base."""

    def check(self) -> None:
        check_numbers(self, "beta")
        check_numbers(self, "weight_from", most=1.0)
        check_given(self, "slope", "bias", least=-math.inf)

    def idle(self) -> dict[str, str]:
        return {"beta": "needs --base trades"} if self.base == "at" else {}


@register_method("mail")
class Mail(Method[MailOptions]):
    """Adversarial training with margin-aware weights."""

    options_type = MailOptions
    smooths_labels = True
    attack_defaults = AttackDefaults(start="gaussian")

    def __init__(self, options: MailOptions) -> None:
        super().__init__(options)
        self.takes_targets = options.base != "trades"
        self.couples_images = options.weight_scale == "normalized"
        published = PUBLISHED[options.base]
        self.slope = published[0] if options.slope is None else options.slope
        self.bias = published[1] if options.bias is None else options.bias

    def weighted(self) -> bool:
        """True if the images are weighted in this epoch."""
        return self.begun("weight_from")

    def begins(self) -> dict[str, float]:
        return {"weight_from": self.options.weight_from}

    def constants(self) -> tuple[float, ...]:
        return (self.weighted(),)

    def inner(self, nets: Networks, batch: Batch) -> Inner:
        return Inner(kl_to_self(nets, batch) if self.options.base == "trades" else self.true_goal(batch))

    def outer(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Outer:
        clean = nets.model(batch.x) if self.options.base == "trades" else None
        adv = nets.model(attacked.x_adv)
        weights = None
        if self.weighted():
            scale = self.options.weight_scale
            weights = mail_weights(adv, batch.labels, slope=self.slope, bias=self.bias, scale=scale)
        if clean is None:
            loss = self.fit(adv, batch, weights=weights).loss
        else:
            loss = self.fit(clean, batch).loss + self.options.beta * mean_kl(clean, adv, weights=weights)
        clean_log = {} if clean is None else {"train_acc": accuracy(clean, batch)}
        return Outer(
            {"model": loss}, {"loss": loss.detach(), **clean_log, "train_adv_acc": accuracy(adv, batch)}
        )
