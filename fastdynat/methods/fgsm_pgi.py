"""FGSM-PGI: one step from the prior of the image's own last batch (Jia et al. 2022, arXiv 2207.08859).

    x0 = clip(x + d),   g = grad CE(f(x0), y),   m <- g / mean |g| + decay m
    x' = x + clip(d + eps sign g),   d <- clip(d + eps sign m)      clip: to the ball and the image range
    min CE(f(x'), y) + mse_weight MSE(f(x'), f(x0))

This is the paper's form with momentum (FGSM-MEP). Perturbation d and momentum m belong to an image and go
from epoch to epoch. All of them begin anew every `reset_epochs` epochs, with d = eps sign(uniform) and m = 0.
One forward pass at x0 gives the gradient of the attack and the logits of the regulariser, and the update
differentiates both passes. The network is in train mode throughout: both passes move its statistics.

FastAT_Benchmark is reproduced (fast_at/fgsm_pgi.py), whose recipe adds --label-smoothing 0.4, in both
cross-entropies, and --ema 0.9995. The authors' code (FGSM_MEP.py) takes the same step with other settings:
its labels have 0.6 of the probability and the other classes a ninth of the rest each, it trains for 110
epochs with drops at 100 and 105, without an average, and does not clip x0 to the image range.

Details, and how they are treated here:

- d is added to the image as it is augmented now, wherever crop and flip have moved the object, as in both
  codes.
- the codes divide g by the L1 norm over the whole batch. Only the ratio of g to the old m matters, and with
  the mean over the entries of the batch, on all processes, it is the same in batches of one size. In a
  smaller last batch the codes give g the weight of a larger one; here it has its own.
- d is stored in int8, without loss for 8-bit images and eps a whole number of pixel levels
  (`image_state.levels`), m in float16: 3 bytes per entry instead of 8. An image of 3x32x32 takes 9 KiB.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdynat.attack_engine.ascent import FP16_LOSS_SCALE
from fastdynat.attack_engine.engine import Attacker
from fastdynat.attack_engine.goal import wide
from fastdynat.attack_engine.one_step_starts import PriorStart
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attacks import AttackResult
from fastdynat.data import Batch
from fastdynat.distributed import batch_world
from fastdynat.errors import UserError
from fastdynat.methods import (
    AttackDefaults,
    Inner,
    Method,
    MethodOptions,
    Networks,
    Outer,
    check_numbers,
    register_method,
)
from fastdynat.methods.building_blocks import batch_share, check_linf
from fastdynat.methods.image_state import (
    begin_period,
    from_int8,
    is_missing,
    perturbation_rows,
    rows_of,
    store_perturbations,
    to_float16,
)
from fastdynat.ops import attack_step_linf, pgd_step_linf
from fastdynat.ops.image_draws import uniform_like


@dataclass(frozen=True, kw_only=True)
class FgsmPgiOptions(MethodOptions):
    """Options of FGSM-PGI; the defaults are the released code's."""

    mse_weight: float = 10.0
    """Weight of the squared difference between the logits at the start and those of the attacked image."""

    momentum_decay: float = 0.3
    """Share of an image's gradient momentum that carries over from one epoch to the next."""

    reset_epochs: int = 40
    """Epochs after which all perturbations begin anew, at random."""

    def check(self) -> None:
        check_numbers(self, "mse_weight")
        check_numbers(self, "momentum_decay", most=1.0)
        check_numbers(self, "reset_epochs", least=1)


@register_method("fgsm_pgi")
class FgsmPgi(Method[FgsmPgiOptions]):
    """``min CE(f(x'), y) + mse_weight MSE(f(x'), f(x0))``, x' one step from the image's own perturbation."""

    options_type = FgsmPgiOptions
    attack_defaults = AttackDefaults(start="none", steps=1, step_ratio=1.0)
    follows_ramp = True
    smooths_labels = True
    couples_images = True
    follows_images = True
    retains_graph = True
    searches = False
    takes_any_attack = False
    unused_attack = ("attack_bn",)

    def check_attack(self, spec: PGDSpec, attack_bn: str) -> None:
        check_linf(spec, "fgsm_pgi")
        if spec.steps != 1 or spec.start != "none":
            raise UserError(
                "fgsm_pgi takes 1 step from where the image's last one ended, "
                f"got steps {spec.steps} and start {spec.start}; "
                "leave --steps and --start out, or use --method madry"
            )

    def make_buffers(self, x: Tensor) -> dict[str, Tensor]:
        momentum = x.new_zeros(self.num_images, *x.shape[1:], dtype=torch.float16)
        return {"momentum": momentum, **perturbation_rows(x, self.num_images)}

    def begin_epoch(self) -> None:
        begin_period(self.buffers, self.epoch // self.options.reset_epochs)

    def inner(self, nets: Networks, batch: Batch) -> Inner:
        return Inner(goal=None)

    def perturb(self, nets: Networks, batch: Batch, inner: Inner, attack: Attacker) -> PriorStart:
        x, kept = batch.x, self.buffers
        fresh = is_missing(kept, batch)
        signs = torch.where(uniform_like(x, attack.draws, *x.shape[1:]) < 0.5, -1.0, 1.0).to(x.dtype)
        delta = from_int8(rows_of(kept["delta"], batch), attack.spec.eps, x.dtype)
        start = x + torch.where(fresh, attack.eps * signs, delta)
        momentum = rows_of(kept["momentum"], batch).to(x.dtype).masked_fill(fresh, 0)
        none = torch.zeros((), dtype=torch.int64, device=x.device)
        return PriorStart(start.clamp(0, 1), none, 0, start=start, momentum=momentum, attack=attack)

    def outer(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Outer:
        assert isinstance(attacked, PriorStart)
        leaf = attacked.x_adv.detach().requires_grad_()
        prior = nets.model(leaf)
        gradient = self._gradient(prior, leaf, batch)
        size, eps = attacked.attack.step_size, attacked.attack.eps
        step = attack_step_linf(attacked.start, gradient, batch.x, step_size=size, eps=eps)
        momentum = gradient / _mean_size(gradient, batch) + self.options.momentum_decay * attacked.momentum
        x_next = pgd_step_linf(attacked.start, momentum, batch.x, step_size=size, eps=eps)
        self._store(batch, x_next, momentum, attacked)

        logits = nets.model(step.x_adv)
        fit = self.fit(logits, batch)
        loss = fit.loss + self.options.mse_weight * F.mse_loss(wide(logits), wide(prior))
        logs = {
            "loss": loss.detach(),
            "train_adv_acc": batch_share(fit.target_correct, batch),
            "zero_grad_share": (~step.moved).double().mean(),
        }
        return Outer({"model": loss}, logs)

    def _gradient(self, logits: Tensor, leaf: Tensor, batch: Batch) -> Tensor:
        """The gradient of the summed loss at `leaf`, up to a constant factor; 0 where it is no number."""
        scale = len(batch.x) * (FP16_LOSS_SCALE if logits.dtype is torch.float16 else 1.0)
        loss = self.fit(logits, batch).loss * scale
        (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        return gradient.nan_to_num(0.0, posinf=0.0, neginf=0.0)

    def _store(self, batch: Batch, x_next: Tensor, momentum: Tensor, attacked: PriorStart) -> None:
        eps, rows = attacked.attack.spec.eps, to_float16(momentum)
        store_perturbations(self.buffers, x_next - batch.x, eps, batch, momentum=rows)


def _mean_size(gradient: Tensor, batch: Batch) -> Tensor:
    """The mean of |g| over the images of all ranks, a scalar; never 0."""
    total = batch_world().sum_(gradient.abs().sum(dtype=torch.float64))
    entries = batch.share.images_of_all_ranks * gradient[0].numel()
    return (total / entries).to(gradient.dtype).clamp_min(torch.finfo(gradient.dtype).tiny)
