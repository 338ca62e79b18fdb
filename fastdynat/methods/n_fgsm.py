"""N-FGSM: one step from strong noise, not clipped to the ball (de Jorge et al. 2022, arXiv 2202.01181)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fastdynat.attack_engine.engine import Attacker
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attack_engine.steps import start_point
from fastdynat.attacks import AttackResult
from fastdynat.data import Batch
from fastdynat.errors import UserError
from fastdynat.methods import MOST, AttackDefaults, Inner, Networks, register_method
from fastdynat.methods.building_blocks import check_linf, check_one_step
from fastdynat.methods.madry import Madry, MadryOptions


@dataclass(frozen=True, kw_only=True)
class NFgsmOptions(MadryOptions):
    """Options of N-FGSM."""

    noise: float = 2.0
    """k: the start is uniform in a ball of k times eps."""

    def check(self) -> None:
        if self.prior_epochs:
            raise UserError(
                f"prior_epochs {self.prior_epochs}: n_fgsm starts every attack from noise; leave it out, or "
                "use --method fgsm_rs"
            )
        if not 0 < self.noise <= MOST:
            raise UserError(
                f"noise must be above 0 (the paper's is 2), got {self.noise:g}; without noise it is FGSM"
            )


@register_method("n_fgsm")
class NFgsm(Madry):
    """``x' = x + n + eps sign grad CE(f(x + n), y)``, n uniform in k times the ball (algorithm 1).

    x' is not projected onto the ball: it is up to (k + 1) eps from x, and clipped to the image range only.
    """

    options_type = NFgsmOptions
    follows_ramp = True
    attack_defaults = AttackDefaults(steps=1, step_ratio=1.0)
    takes_any_attack = False

    def __init__(self, options: NFgsmOptions) -> None:
        super().__init__(options)
        self.noise = options.noise

    def check_attack(self, spec: PGDSpec, attack_bn: str) -> None:
        check_one_step(spec, "n_fgsm")
        check_linf(spec, "n_fgsm")
        if spec.start != "uniform":
            raise UserError(f"n_fgsm starts from uniform noise, got start {spec.start}; leave --start out")

    def perturb(self, nets: Networks, batch: Batch, inner: Inner, attack: Attacker) -> AttackResult:
        assert inner.goal is not None
        spec = attack.spec
        x_start = start_point(
            batch.x, "uniform", norm="linf", eps=self.noise * attack.eps, generator=attack.draws
        )
        # A ball that the step cannot leave: noise plus one step, or the whole image range.
        wide = replace(spec, eps=min(1.0, self.noise * spec.eps + spec.step_size), start="none")
        sizes = None
        if attack.sizes is not None:
            eps, step_size = attack.sizes
            sizes = torch.stack([(self.noise * eps + step_size).clamp_max(1.0), step_size])
        return attack(batch.x, inner.goal, spec=wide, x_start=x_start, sizes=sizes)
