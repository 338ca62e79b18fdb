"""IKL: improved Kullback-Leibler divergence loss (Cui et al. 2024, arXiv 2305.13948).

The KL from the clean to the attacked prediction has the gradient of a weighted mean square error of the
differences of logits plus a cross-entropy with soft labels. IKL weights the first by the mean prediction of
the image's class, in place of the image's own, and lets its gradient flow into both images' logits::

    x' = PGD on KL(p(x) || p(.))            model in eval mode, start x + 0.001 N(0, I)
    min  CE(f(x), y) + mse_weight / 4 mean sum_jk w_j w_k (z_j - z_k - z'_j + z'_k)^2
                     + soft_weight CE(sg[p(x)], p(x')),       z = f(x), z' = f(x'), w = prior_y

`prior`, a row per class y, is the mean of softmax(f(x) / temperature) over the images of the class in the
epoch before, each as its update saw it; in the first epoch it is 1 / K. The double sum over classes is
computed as a single one: 2 sum_j w_j sum_k w_k (d_k - m)^2, with d = z - z' and m the mean of d under w.

Details of the released code (DKLv1, train_dkl_cifar10.py), and how they are treated here:

- the attacked batch passes through the network before the clean one, both in train mode. Kept.
- with weight perturbation, the predictions that enter the prior are those of the perturbed weights. Kept.
- a class without an image in an epoch makes its prior NaN. Here it keeps the prior it had.
- the radius grows from 0 to eps over the whole run, with 5 steps of half the radius in each epoch (its
  conditions for 2, 3 and 4 steps are overwritten). The steps are the default here; the ramp is an option of
  the attack.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdynat.attack_engine.goal import soft_cross_entropy, wide
from fastdynat.attacks import AttackResult
from fastdynat.data import Batch
from fastdynat.distributed import batch_world
from fastdynat.methods import (
    AttackDefaults,
    Inner,
    Method,
    MethodOptions,
    Networks,
    Outer,
    check_numbers,
    check_positive,
    register_method,
)
from fastdynat.methods.building_blocks import accuracy
from fastdynat.methods.trades import kl_to_self


@dataclass(frozen=True, kw_only=True)
class IklOptions(MethodOptions):
    """Options of IKL; the defaults are the released script's."""

    mse_weight: float = 20.0
    """Weight of the weighted MSE of pairwise logit differences (beta in the release)."""

    soft_weight: float = 4.0
    """Weight of the cross-entropy between clean and adversarial predictions (alpha in the release)."""

    temperature: float = 4.0
    """Temperature of the softmax in the mean predictions of the classes."""

    def check(self) -> None:
        check_numbers(self, "mse_weight", "soft_weight")
        check_positive(self, "temperature")

    def idle(self) -> dict[str, str]:
        return {"temperature": "needs --mse-weight above 0"} if self.mse_weight == 0 else {}


@register_method("ikl")
class Ikl(Method[IklOptions]):
    """``min CE(f(x), y) + mse_weight wMSE(f(x), f(x')) + soft_weight CE(sg[p(x)], p(x'))``."""

    options_type = IklOptions
    smooths_labels = takes_mixed_labels = True
    attack_defaults = AttackDefaults(start="gaussian", steps=5, step_ratio=0.5)

    def make_buffers(self, x: Tensor) -> dict[str, Tensor]:
        """`prior` (K, K), `sums` (K, K) of this epoch's predictions by class, and the `epoch` of the sums."""
        k = self.num_classes
        exact: Any = {"dtype": torch.float64, "device": x.device}
        return {
            "prior": torch.full((k, k), 1 / k, **exact),
            "sums": torch.zeros(k, k, **exact),
            "epoch": torch.zeros((), dtype=torch.int64, device=x.device),
        }

    def begin_epoch(self) -> None:
        if int(self.buffers["epoch"]) == self.epoch:
            return
        sums, prior = self.buffers["sums"], self.buffers["prior"]
        images = sums.sum(1, keepdim=True)
        prior.copy_(torch.where(images > 0, sums / images, prior))
        sums.zero_()
        self.buffers["epoch"].fill_(self.epoch)

    def inner(self, nets: Networks, batch: Batch) -> Inner:
        return Inner(kl_to_self(nets, batch))

    def outer(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Outer:
        logits, clean = nets.model(attacked.x_adv), nets.model(batch.x)
        loss = self.loss(clean, logits, batch)
        probs = (wide(clean.detach()) / self.options.temperature).softmax(1).double()
        self.buffers["sums"].add_(batch_world().sum_(self._labels(batch).T @ probs))
        logs = {
            "loss": loss.detach(),
            "train_acc": accuracy(clean, batch),
            "train_adv_acc": accuracy(logits, batch),
        }
        return Outer({"model": loss}, logs)

    def awp_loss(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Tensor:
        return self.loss(nets.model(batch.x), nets.model(attacked.x_adv), batch)

    def loss(self, clean: Tensor, logits: Tensor, batch: Batch) -> Tensor:
        """The loss of clean and attacked images with these logits (N, K), a scalar."""
        options, z, z_adv = self.options, wide(clean), wide(logits)
        loss = self.fit(clean, batch).loss
        loss = loss + options.soft_weight * soft_cross_entropy(z_adv, z.detach().softmax(1)).mean()
        weights = (self._labels(batch) @ self.buffers["prior"]).to(z.dtype)
        return loss + options.mse_weight * weighted_gap(z - z_adv, weights).mean()

    def _labels(self, batch: Batch) -> Tensor:
        """The labels as probabilities of the classes, (N, K) float64."""
        if batch.mixed is not None:
            return batch.mixed.double()
        classes = torch.arange(self.num_classes, device=batch.labels.device)
        return (batch.labels[:, None] == classes).double()


def weighted_gap(gap: Tensor, weights: Tensor) -> Tensor:
    """``sum_jk w_j w_k (d_j - d_k)^2 / 4`` per image, (N,), from d and w, both (N, K), w >= 0."""
    total = weights.sum(1, keepdim=True)
    mean = (weights * gap).sum(1, keepdim=True) / total
    return total.squeeze(1) * (weights * (gap - mean).square()).sum(1) / 2
