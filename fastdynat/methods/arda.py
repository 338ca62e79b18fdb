"""Adversarial data augmentation: mixed batches (Goodfellow et al. 2015, Kurakin et al. 2017).

    min  (1 - loss_share) mean CE(f(x), y) + loss_share mean CE(f(x'), y),   x' = PGD on CE(f(.), y)

The first `adversarial_share` of each (shuffled) batch is attacked and the rest stays clean. Both parts pass
through the network as one batch, so batch statistics mix, as in Kurakin et al. (arXiv 1611.01236); every
process has its part of both. A share of 0 is natural training and a share of 1 is Madry's method, bit for
bit. The published attacks take a single step, against which a network can learn to mask its gradient; the
default is Madry's ten steps, and ``--steps 1 --start none --step-size EPS`` is Goodfellow's FGSM.

The variant for domain generalisation, max CE(f(x'), y) - gamma c(x, x'), is not implemented: its attack goal
depends on the image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastdynat.attack_engine.engine import Attacker
from fastdynat.attacks import AttackResult
from fastdynat.data import Batch
from fastdynat.errors import UserError
from fastdynat.methods import Inner, Method, MethodOptions, Networks, Outer, check_numbers, register_method
from fastdynat.methods.base import unattacked
from fastdynat.methods.building_blocks import batch_share


@dataclass(frozen=True, kw_only=True)
class ArdaOptions(MethodOptions):
    """Options of adversarial data augmentation."""

    adversarial_share: float = 0.5
    """Share of each batch's images that are attacked, rounded to whole images."""

    loss_share: float = 0.5
    """Weight of the attacked images in the loss of a batch with both kinds; the clean ones get the rest. 0.23
    is Kurakin et al.'s (lambda 0.3)."""

    def check(self) -> None:
        check_numbers(self, "adversarial_share", "loss_share", most=1.0)

    def idle(self) -> dict[str, str]:
        one_kind = self.adversarial_share in (0, 1)
        return {"loss_share": "with this --adversarial-share all images are of one kind"} if one_kind else {}


@register_method("arda")
class Arda(Method[ArdaOptions]):
    """Cross-entropy on batches of attacked and clean images."""

    options_type = ArdaOptions
    follows_ramp = True
    takes_targets = True
    smooths_labels = takes_mixed_labels = True
    logs_adv_acc = False

    def __init__(self, options: ArdaOptions) -> None:
        super().__init__(options)
        # A micro-batch would have one kind alone, and batch norm would normalise the kinds apart.
        self.couples_images = 0 < options.adversarial_share < 1

    def check_sync_bn(self, attack_bn: str) -> None:
        if self.couples_images and attack_bn != "eval":
            raise UserError(
                f"--attack-bn {attack_bn}: method arda with synchronised batch norm in several processes "
                "takes eval, since every process would wait for one that has no images to attack; use "
                "--attack-bn eval or --sync-bn off"
            )

    def num_attacked(self, batch: Batch) -> int:
        """The number of attacked images in `batch`: its first ones, as in the whole global batch."""
        return batch.share.below(self._all_attacked(batch))

    def _all_attacked(self, batch: Batch) -> int:
        return math.floor(self.options.adversarial_share * batch.share.total + 0.5)

    def inner(self, nets: Networks, batch: Batch) -> Inner:
        attacked = slice(self.num_attacked(batch))
        goal = self.true_goal(batch)
        return Inner(replace(goal, target=goal.target[attacked]) if attacked.stop else None)

    def perturb(self, nets: Networks, batch: Batch, inner: Inner, attack: Attacker) -> AttackResult:
        if inner.goal is None:
            return unattacked(batch.x)
        attacked = self.num_attacked(batch)
        found, clean = attack.take(slice(attacked))(batch.x[:attacked], inner.goal), batch.x[attacked:]
        norm = None
        if found.norm is not None:
            norm = torch.cat([found.norm, found.norm.new_full((len(clean),), -1)])  # clean images have none
        return AttackResult(torch.cat([found.x_adv, clean]), found.zero_grads, found.gradients, norm=norm)

    def outer(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Outer:
        logits = nets.model(attacked.x_adv)
        fit = self.fit(logits, batch, weights=self.weights(batch))
        return Outer(
            {"model": fit.loss},
            {"loss": fit.loss.detach(), "train_mixed_acc": batch_share(fit.target_correct, batch)},
        )

    def weights(self, batch: Batch) -> Tensor | None:
        """Weights of mean 1 in the global batch that give each kind its share; None where all are 1."""
        images, attacked = batch.share.total, self._all_attacked(batch)
        if attacked in (0, images):
            return None
        clean = (1 - self.options.loss_share) * images / (images - attacked)
        weights = batch.x.new_full((len(batch.labels),), clean)
        weights[: self.num_attacked(batch)] = self.options.loss_share * images / attacked
        return weights
