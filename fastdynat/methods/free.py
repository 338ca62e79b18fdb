"""Free adversarial training (Shafahi et al. 2019, arXiv 1904.12843)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdynat.attack_engine.engine import Attacker
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attack_engine.steps import pgd_step
from fastdynat.attacks import AttackResult
from fastdynat.data import Batch
from fastdynat.errors import UserError
from fastdynat.methods import AttackDefaults, Inner, Method, MethodOptions, Networks, Outer, register_method
from fastdynat.methods.building_blocks import batch_share

MOST_REPLAYS = 10_000


@dataclass(frozen=True, kw_only=True)
class FreeOptions(MethodOptions):
    """Options of free adversarial training."""

    replays: int = 8
    """m: updates per batch. To match the cost of N epochs of natural training, train for N / m epochs."""

    def check(self) -> None:
        if not 1 <= self.replays <= MOST_REPLAYS:
            raise UserError(
                f"replays must be >= 1 (the paper's is 8) and at most {MOST_REPLAYS}, got {self.replays}"
            )


@register_method("free")
class Free(Method[FreeOptions]):
    """``min CE(f(x + d), y)``, m times per batch, each with ``d <- clip(d + eps sign grad_d)`` (algorithm 1).

    The perturbation carries over from each batch to the next, by position in the batch, and through a
    checkpoint into a resumed run. As in the re-implementation of Wong et al., it is clipped so that the
    images it was computed on stay in the image range; here, the next images are clipped too when it is added
    to them. The network is in train mode throughout, as there is no other pass. All replays of a batch use
    the same learning rate.
    """

    options_type = FreeOptions
    follows_ramp = True
    smooths_labels = takes_mixed_labels = True
    attack_defaults = AttackDefaults(steps=1, step_ratio=1.0, start="none")
    searches = False
    takes_any_attack = False
    unused_attack = ("attack_bn",)  # its gradient is the update's own, in train mode

    def __init__(self, options: FreeOptions) -> None:
        super().__init__(options)
        self.replays = options.replays

    def check_attack(self, spec: PGDSpec, attack_bn: str) -> None:
        if spec.steps != 1 or spec.start != "none":
            raise UserError(
                "free takes 1 step per replay from where the last one ended, "
                f"got steps {spec.steps} and start {spec.start}; "
                "leave --steps and --start out, or use --method madry"
            )

    def make_buffers(self, x: Tensor) -> dict[str, Tensor]:
        return {"delta": torch.zeros_like(x)}

    def inner(self, nets: Networks, batch: Batch) -> Inner:
        return Inner(goal=None)

    def perturb(self, nets: Networks, batch: Batch, inner: Inner, attack: Attacker) -> AttackResult:
        delta = self.buffers["delta"][: len(batch.x)]
        x_adv = (batch.x + delta).clamp(0, 1).requires_grad_()
        return AttackResult(x_adv, torch.zeros((), dtype=torch.int64, device=batch.x.device), 0)

    def outer(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Outer:
        fit = self.fit(nets.model(attacked.x_adv), batch)
        return Outer(
            {"model": fit.loss},
            {"loss": fit.loss.detach(), "train_adv_acc": batch_share(fit.target_correct, batch)},
        )

    def after_backward(self, batch: Batch, attacked: AttackResult, attack: Attacker) -> None:
        grad = attacked.x_adv.grad
        assert grad is not None
        moved = pgd_step(
            attacked.x_adv.detach(),
            grad,
            batch.x,
            norm=attack.spec.norm,
            step_size=attack.step_size,
            eps=attack.eps,
        )
        self.buffers["delta"][: len(batch.x)].copy_(moved.x_adv - batch.x)
