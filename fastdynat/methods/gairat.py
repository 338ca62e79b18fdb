"""GAIRAT: geometry-aware instance-reweighted adversarial training (Zhang et al. 2021, arXiv 2010.01736).

    min  mean w_i CE(f(x'_i), y_i),   x' = PGD on CE(f(.), y), uniform start
    w_i ~ 1 + tanh(lam + 5 (1 - 2 kappa_i / S)), scaled to mean 1

kappa_i is the number of the S attack steps at which the image is still classified correctly: images near the
decision boundary weigh more.

Details of the released code, and how they are treated here:

- all weights are 1 in the first half of the run: `weight_from`. (It counts epochs from 1 and starts at number
  60 of 120, one epoch before the half; 30 of 100 for ResNet-18.)
- it halves S as an integer, so its weights differ from the formula for odd S, and S = 1 divides by zero. Here
  the formula holds for any S.
- its schedule "piecewise" for lambda never reaches the second and third piece. Here lambda is constant, its
  default.

The authors concede that the gain does not hold against attacks other than PGD: evaluate with cw beside pgd20.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastdynat.attacks import AttackResult
from fastdynat.data import Batch
from fastdynat.methods import Inner, Method, MethodOptions, Networks, Outer, check_numbers, register_method
from fastdynat.methods.building_blocks import batch_share
from fastdynat.methods.weighting import GAIRAT_FROM, gairat_weights


@dataclass(frozen=True, kw_only=True)
class GairatOptions(MethodOptions):
    """Options of GAIRAT; the defaults are the released code's."""

    lam: float = -1.0
    """Lambda of the weights; a higher value makes them more equal."""

    weight_from: float = GAIRAT_FROM
    """Share of the epochs after which the images are weighted."""

    def check(self) -> None:
        check_numbers(self, "lam", least=-math.inf)
        check_numbers(self, "weight_from", most=1.0)


@register_method("gairat")
class Gairat(Method[GairatOptions]):
    """``min mean w_i CE(f(x'_i), y_i)`` with weights from the number of steps that an attack needs."""

    options_type = GairatOptions
    smooths_labels = True
    couples_images = True

    def weighted(self) -> bool:
        """True if the images are weighted in this epoch."""
        return self.begun("weight_from")

    def begins(self) -> dict[str, float]:
        return {"weight_from": self.options.weight_from}

    def constants(self) -> tuple[float, ...]:
        return (self.weighted(),)

    def inner(self, nets: Networks, batch: Batch) -> Inner:
        return Inner(self.true_goal(batch, track=self.weighted()))

    def outer(self, nets: Networks, batch: Batch, inner: Inner, attacked: AttackResult) -> Outer:
        weights = gairat_weights(attacked, self.options.lam) if self.weighted() else None
        logits = nets.model(attacked.x_adv)
        fit = self.fit(logits, batch, weights=weights)
        return Outer(
            {"model": fit.loss},
            {"loss": fit.loss.detach(), "train_adv_acc": batch_share(fit.target_correct, batch)},
        )
