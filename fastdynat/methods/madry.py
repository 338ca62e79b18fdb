"""PGD adversarial training (Madry et al. 2018, arXiv 1706.06083)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdynat.attack_engine.engine import Attacker
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attack_engine.steps import start_point
from fastdynat.attacks import AttackResult
from fastdynat.data import Batch
from fastdynat.errors import UserError
from fastdynat.methods import Inner, Method, MethodOptions, Networks, Outer, check_numbers, register_method
from fastdynat.methods.building_blocks import batch_share, clean_statistics_pass, statistics_pass
from fastdynat.methods.image_state import (
    begin_period,
    from_int8,
    is_missing,
    perturbation_rows,
    rows_of,
    store_perturbations,
)


@dataclass(frozen=True, kw_only=True)
class MadryOptions(MethodOptions):
    """Options of PGD adversarial training."""

    bn_clean_forward: bool = False
    """After the attacked batch, also update the running statistics with the clean batch (as DYNAT's release
    does)."""

    bn_attack_forward: bool = False
    """Before the update, pass the attacked batch through the model once more, which updates the running
    statistics: the release of Rice et al. ends every attack with such a pass to compute its loss."""

    bn_clean_after: bool = False
    """After the update, pass the clean batch through the model, which updates the running statistics: that
    release measures its training accuracy this way."""

    prior_epochs: int = 0
    """Start the attack on an image from where its last one ended, and reset this every N epochs; 0 never
    reuses perturbations. Changes the algorithm."""

    def check(self) -> None:
        check_numbers(self, "prior_epochs")


@register_method("madry")
class Madry(Method[MadryOptions]):
    """``min CE(f(x'), y)`` with x' from PGD on ``CE(f(.), y)``, equation 2.1 of the paper.

    With `prior_epochs` PGD starts at ``clip(x + d)``, d the image's last ``x' - x`` (`image_state`), as in
    ATTA (Zheng et al. 2020, arXiv 1912.11969), which also moves d with crop and flip, and in FGSM-EP (Jia et
    al. 2022, arXiv 2207.08859). d is in the coordinates of the augmented image, as in the latter.
    """

    options_type = MadryOptions
    follows_ramp = True
    takes_targets = True
    smooths_labels = takes_mixed_labels = True

    def __init__(self, options: MadryOptions) -> None:
        super().__init__(options)
        if options.prior_epochs:
            self.follows_images, self.takes_mixed_labels = True, False

    def check_attack(self, spec: PGDSpec, attack_bn: str) -> None:
        if self.options.prior_epochs and spec.norm != "linf":
            raise UserError(
                f"prior_epochs {self.options.prior_epochs} works only under linf, got norm {spec.norm}; "
                "leave --prior-epochs out"
            )

    def make_buffers(self, x: Tensor) -> dict[str, Tensor]:
        return perturbation_rows(x, self.num_images) if self.options.prior_epochs else {}

    def begin_epoch(self) -> None:
        if self.options.prior_epochs:
            begin_period(self.buffers, self.epoch // self.options.prior_epochs)

    def perturb(self, nets: Networks, batch: Batch, inner: Inner, attack: Attacker) -> AttackResult:
        if not self.options.prior_epochs:
            return super().perturb(nets, batch, inner, attack)
        assert inner.goal is not None
        spec, kept = attack.spec, self.buffers
        anew = start_point(batch.x, spec.start, norm="linf", eps=attack.eps, generator=attack.draws)
        delta = from_int8(rows_of(kept["delta"], batch), spec.eps, batch.x.dtype)
        start = torch.where(is_missing(kept, batch), anew, (batch.x + delta).clamp(0, 1))
        found = attack(batch.x, inner.goal, x_start=start)
        store_perturbations(kept, found.x_adv - batch.x, spec.eps, batch)
        return found

    def inner(self, nets: Networks, batch: Batch) -> Inner:
        return Inner(self.true_goal(batch))

    def outer(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Outer:
        fit = self.fit(nets.model(attacked.x_adv), batch)
        if self.options.bn_clean_forward:
            clean_statistics_pass(nets, batch)
        return Outer(
            {"model": fit.loss},
            {"loss": fit.loss.detach(), "train_adv_acc": batch_share(fit.target_correct, batch)},
        )

    def after_attack(self, nets: Networks, batch: Batch, attacked: AttackResult) -> None:
        if self.options.bn_attack_forward:
            statistics_pass(nets, attacked.x_adv)

    def after_update(self, nets: Networks, batch: Batch) -> None:
        if self.options.bn_clean_after:
            clean_statistics_pass(nets, batch)
