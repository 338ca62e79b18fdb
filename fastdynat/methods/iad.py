"""IAD: introspective adversarial distillation (Zhu et al., ICLR 2022, arXiv 2106.04928).

The model trusts a robust guide as far as the guide is right on the model's own attacked images, and relies on
itself for the rest, from the share `begin` of the run on. Per image, with trust a = p_g(x')_y ^ beta (a = 1
before that)::

    x'          = PGD on CE(f(.), y), uniform start
    KL_self     = KL(p(x) || p(x'))                                   gradient through both arguments
    variant I   : alpha [T^2 KL(g_T(x) || p_T(x')) + (1 - a) KL_self] + (1 - alpha) CE(f(x), y)
    variant II  : alpha T^2 [a KL(g_T(x') || p_T(x')) + (1 - a) KL_self] + (1 - alpha) CE(f(x'), y)

g_T and p_T are the softmax of guide's and model's logits / T; KL is summed over classes and averaged over the
batch. A run has one guide, so variant II is the released one without its second, naturally trained teacher
(alpha2 = 0).

Details of the released code, and how they are treated here:

- variant I does not multiply the guide's term by a and evaluates the guide at x; II multiplies it and
  evaluates the guide at x'. Kept.
- T^2 multiplies KL_self in variant II only. Kept; the two agree at T = 1.
- variant I runs the clean batch through the model in train mode after the attacked one even if no loss needs
  it, and a second time from `begin` on; each pass updates the running statistics that evaluation uses. Kept:
  `bn_clean_passes`. Variant II has one such pass from `begin` on.
- it attacks the model in train mode, so every attack step updates the running statistics too: --attack-bn
  train. The default here is eval, as for every other method.
- its learning rate falls once, at half of the run, not twice: its loop is ARD's.
- variant II declares --beta twice and therefore does not start as shipped; the second declaration's 0.1 is
  used here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastdynat.attack_engine.goal import kl_from_log_probs, wide
from fastdynat.attacks import AttackResult
from fastdynat.data import Batch
from fastdynat.methods import (
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
from fastdynat.methods.building_blocks import accuracy, clean_statistics_pass, guide_logits

ALPHA, BEGIN = {"I": 1.0, "II": 0.5}, {"I": 0.3, "II": 0.2}


@dataclass(frozen=True, kw_only=True)
class IadOptions(MethodOptions):
    """Options of IAD; the defaults are the released code's."""

    variant: Literal["I", "II"] = "I"
    """One of the two published losses."""

    alpha: float | None = None
    """Weight of the distillation; 1 - alpha is that of the cross-entropy; None is 1 for variant I, 0.5 for
    II."""

    temperature: float = 1.0
    """Divides the logits in the guide's term, which is multiplied by its square."""

    beta: float = 0.1
    """Exponent of the guide's probability for the true class; 0 trusts it always."""

    begin: float | None = None
    """Share of the epochs after which trust is measured; None is 0.3 for variant I, 0.2 for II (60 and 40 of
    200)."""

    bn_clean_passes: bool = True
    """Variant I: update the model's running statistics with each clean batch once before `begin` and twice
    after; otherwise only where a loss needs the clean batch."""

    def check(self) -> None:
        check_given(self, "alpha", "begin", most=1.0)
        check_numbers(self, "beta")
        check_positive(self, "temperature")

    def idle(self) -> dict[str, str]:
        return {"bn_clean_passes": "needs --variant I"} if self.variant == "II" else {}


@register_method("iad")
class Iad(Method[IadOptions]):
    """Introspective adversarial distillation; the guide is a robust network."""

    options_type = IadOptions
    takes_targets = True
    smooths_labels = True
    uses_guide = True
    guide_made_by = "madry"

    def __init__(self, options: IadOptions) -> None:
        super().__init__(options)
        self.alpha = ALPHA[options.variant] if options.alpha is None else options.alpha
        self.smooths_labels = self.alpha < 1
        self.begin = BEGIN[options.variant] if options.begin is None else options.begin

    def constants(self) -> tuple[float, ...]:
        return (self.introspective(),)

    def introspective(self) -> bool:
        """True if trust is measured in this epoch."""
        return self.begun("begin")

    def begins(self) -> dict[str, float]:
        return {"begin": self.begin}

    def inner(self, nets: Networks, batch: Batch) -> Inner:
        guide = guide_logits(nets, batch.x) if self.options.variant == "I" else None
        return Inner(self.true_goal(batch), dynamic_labels=guide)

    def outer(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Outer:
        options, first, introspective = self.options, self.options.variant == "I", self.introspective()
        # The clean batch comes after the attacked one, as in the release: running statistics depend on the
        # order.
        logits = wide(nets.model(attacked.x_adv))
        clean = wide(nets.model(batch.x)) if introspective or (first and self.alpha < 1) else None
        if first and options.bn_clean_passes and (introspective or clean is None):
            clean_statistics_pass(nets, batch)

        guide = guide_logits(nets, attacked.x_adv) if inner.dynamic_labels is None else inner.dynamic_labels
        log_p = (guide / options.temperature).log_softmax(1)
        taught = options.temperature**2 * kl_from_log_probs(log_p, logits / options.temperature)
        trust = torch.ones_like(taught)
        if introspective:
            assert clean is not None
            log_trust = self._log_trust(guide_logits(nets, attacked.x_adv) if first else guide, batch)
            trust = log_trust.exp()
            own = -log_trust.expm1() * kl_from_log_probs(clean.log_softmax(1), logits)
            taught = taught + own if first else trust * taught + options.temperature**2 * own
        loss = self.alpha * taught.mean()
        if self.alpha < 1:
            fit = self.fit(logits if clean is None or not first else clean, batch)
            loss = loss + (1 - self.alpha) * fit.loss
        logs = {"loss": loss.detach(), "train_adv_acc": accuracy(logits, batch), "trust": trust.mean()}
        return Outer({"model": loss}, logs)

    def _log_trust(self, logits: Tensor, batch: Batch) -> Tensor:
        return self.options.beta * logits.log_softmax(1).gather(1, batch.labels[:, None])[:, 0]
