"""What an inner attack maximises, stated as data so that an engine may choose how to compute it."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

AttackLoss = Literal["ce", "kl", "margin"]


def wide(logits: Tensor) -> Tensor:
    """`logits` in at least float32: losses are never computed in half precision."""
    return logits if logits.dtype == torch.float64 else logits.float()


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """``max_{k != y} z_k - z_y`` per image, (N,): positive exactly where the prediction is wrong (Carlini & Wagner 2017)."""
    true = logits.gather(1, labels[:, None]).squeeze(1)
    return logits.scatter(1, labels[:, None], float("-inf")).amax(1) - true


def soft_cross_entropy(logits: Tensor, probs: Tensor) -> Tensor:
    """``-sum_k p_k log softmax(z)_k`` per image, (N,)."""
    return -(probs * F.log_softmax(logits, dim=1)).sum(1)


def kl_from_log_probs(log_p: Tensor, logits: Tensor) -> Tensor:
    """``KL(p || softmax(z))`` per image, (N,); `log_p` are log-probabilities, so a vanishing p gives 0 and never NaN."""
    return F.kl_div(F.log_softmax(logits, dim=1), log_p, reduction="none", log_target=True).sum(1)


@dataclass(frozen=True)
class AttackGoal:
    """The function of the attacked network's logits that the attack drives up (or down, if `targeted`).

    Attributes:
        loss: "ce" cross-entropy, "kl" Kullback-Leibler divergence from `target`, "margin" the Carlini-Wagner margin.
        target: (N,) int64 classes; for "ce" also (N, K) probabilities; for "kl" (N, K) log-probabilities.
        targeted: drive towards `target` instead of away from it.
    """

    loss: AttackLoss
    target: Tensor
    targeted: bool = False

    def per_image(self, logits: Tensor) -> Tensor:
        """The value to maximise, (N,), at least float32. The sum over images is what attacks differentiate:

        a mean would divide each image's gradient by N, which half precision flushes to zero.
        """
        logits = wide(logits)
        if self.loss == "kl":
            value = kl_from_log_probs(self.target, logits)
        elif self.loss == "margin":
            value = margin(logits, self.target)
        elif self.target.dim() == 2:
            value = soft_cross_entropy(logits, self.target)
        else:
            value = F.cross_entropy(logits, self.target, reduction="none")
        return -value if self.targeted else value

    def reached(self, logits: Tensor) -> Tensor:
        """(N,) bool: the prediction left the goal's class, or arrived at it if `targeted`."""
        classes = self.target if self.target.dim() == 1 else self.target.argmax(1)
        predictions = logits.argmax(1)
        return predictions == classes if self.targeted else predictions != classes

    def clone(self) -> "AttackGoal":
        """A copy whose target may be saved for a backward pass even if it was made under ``inference_mode``."""
        return replace(self, target=self.target.clone())
