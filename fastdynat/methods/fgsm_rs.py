"""FGSM-RS: FGSM adversarial training from a random start (Wong et al. 2020, arXiv 2001.03994)."""

from __future__ import annotations

from dataclasses import dataclass

from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.methods import AttackDefaults, register_method
from fastdynat.methods.building_blocks import check_one_step
from fastdynat.methods.madry import Madry, MadryOptions


@dataclass(frozen=True, kw_only=True)
class FgsmRsOptions(MadryOptions):
    """FGSM-RS is Madry's method with another attack, and has its options."""


@register_method("fgsm_rs")
class FgsmRs(Madry):
    """``x' = clip(x + d + 1.25 eps sign grad CE(f(x + d), y))``, d uniform in the ball (algorithm 3).

    The released code attacks with the batch's statistics (``--attack-bn train``). Watch it for catastrophic
    overfitting.
    """

    options_type = FgsmRsOptions
    attack_defaults = AttackDefaults(steps=1, step_ratio=1.25)
    takes_any_attack = False

    def check_attack(self, spec: PGDSpec, attack_bn: str) -> None:
        check_one_step(spec, "fgsm_rs")
        super().check_attack(spec, attack_bn)
