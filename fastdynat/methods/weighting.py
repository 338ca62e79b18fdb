"""GAIRAT's and MAIL's weights of the images of a batch, by their distance to the decision boundary.

The weights are constants of the loss: no gradient flows into them.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdynat.attack_engine.goal import margin, wide
from fastdynat.attacks import AttackResult
from fastdynat.distributed import batch_world

MailScale = Literal["released", "normalized"]
# Share of the run's epochs without weights: 60 of GAIRAT's 120, 75 of MAIL's 120.
GAIRAT_FROM, MAIL_FROM = 0.5, 0.625


def gairat_weights(attacked: AttackResult, lam: float) -> Tensor:
    """``1 + tanh(lam + 5 (1 - 2 kappa / S))``, scaled to mean 1: (N,) float64 (arXiv 2010.01736).

    kappa is the number of the S attack steps at which the image was still classified correctly: few steps,
    high weight.

    Args:
        attacked: of a goal with ``track=True``, from one run.
        lam: lambda; the higher, the more equal the weights.
    """
    assert attacked.kept is not None
    steps = max(attacked.steps, 1)
    # 1 + tanh(a) is 2 sigmoid(2 a), which does not round to 0 where tanh rounds to -1.
    return _mean_one(F.logsigmoid(2 * (lam + 5 * (1 - 2 * attacked.kept.double() / steps))))


def mail_weights(
    logits: Tensor, labels: Tensor, *, slope: float, bias: float, scale: MailScale = "released"
) -> Tensor:
    """``sigmoid(slope (m + bias))``, m = max_{k != y} p_k - p_y of the attacked images: (N,) (arXiv
    2106.07904).

    Args:
        logits: (N, K) of the attacked images.
        labels: (N,) int64.
        scale: "released" multiplies by 3, as the code does; "normalized" scales to mean 1.
    """
    margins = margin(wide(logits.detach()).softmax(1), labels)
    log_weights = F.logsigmoid(slope * (margins + bias))
    return 3 * log_weights.exp() if scale == "released" else _mean_one(log_weights)


def _mean_one(log_weights: Tensor) -> Tensor:
    """exp(log_weights) over their mean in the global batch; finite however small they are."""
    here = batch_world()
    if here.alone:
        return len(log_weights) * log_weights.softmax(0)
    own = torch.stack([log_weights.logsumexp(0), log_weights.new_tensor(len(log_weights))])
    sizes, images = here.stacked(own).unbind(1)
    return images.sum() * (log_weights - sizes.logsumexp(0)).exp()
