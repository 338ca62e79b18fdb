"""Attack goals: the function of the logits that an attack maximises, as data."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdynat.errors import UserError
from fastdynat.ops import attack_logit_grad

AttackLoss = Literal["ce", "kl", "margin", "dlr"]
# An `AttackGoal` without its target: (loss, targeted, track, confidence).
GoalKind = tuple[AttackLoss, bool, bool, float]


FAINT = 1e-6  # smaller differences of float32 probabilities are rounding errors


def wide(logits: Tensor) -> Tensor:
    """`logits` in at least float32: losses are never computed in half precision."""
    return logits if logits.dtype == torch.float64 else logits.float()


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """``max_{k != y} z_k - z_y`` per image, (N,): positive where the prediction is wrong, 0 at a tie.

    The margin loss of Carlini & Wagner 2017 (arXiv 1608.04644).
    """
    true = logits.gather(1, labels[:, None]).squeeze(1)
    return logits.scatter(1, labels[:, None], float("-inf")).amax(1) - true


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """``-(z_y - max_{k != y} z_k) / (z_(1) - z_(3))`` per image, (N,): difference of logits ratio.

    Croce & Hein 2020 (arXiv 2003.01690), eq. 6; needs three classes. 0 where the denominator is 0.
    """
    top = logits.topk(3, dim=1).values
    gap = top[:, 0] - top[:, 2]
    return torch.where(gap > 0, margin(logits, labels) / torch.where(gap > 0, gap, 1.0), 0.0)


def soft_cross_entropy(logits: Tensor, probs: Tensor) -> Tensor:
    """``-sum_k p_k log softmax(z)_k`` per image, (N,)."""
    return -(probs * F.log_softmax(logits, dim=1)).sum(1)


def cross_entropy_order(logits: Tensor, labels: Tensor) -> Tensor:
    """``logsumexp_{k != y} z_k - z_y``, (N,); the cross-entropy is its softplus.

    It orders points as the cross-entropy does, and still differs where the cross-entropy rounds to 0.
    """
    others = logits.scatter(1, labels[:, None], -math.inf).logsumexp(1)
    return others - logits.gather(1, labels[:, None]).squeeze(1)


def kl_from_log_probs(log_p: Tensor, logits: Tensor) -> Tensor:
    """``KL(p || softmax(z))`` per image, (N,). `log_p` are log-probabilities, so p = 0 gives 0, never NaN."""
    return F.kl_div(F.log_softmax(logits, dim=1), log_p, reduction="none", log_target=True).sum(1)


def scaled_softmax_difference(logits: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """``softmax(z) - q``, with each row scaled by a positive factor, where the difference may underflow.

    Computed from log-probabilities, so that two distributions that both give one class all the probability,
    up to rounding, still differ. A row with equal log-probabilities is 0.

    Returns:
        The scaled difference (N, K), and (N, 1) bool: the unscaled difference is only rounding.
    """
    log_p, log_q = wide(logits).log_softmax(1), wide(log_q)
    p = log_p.exp()
    lost = (p - log_q.exp()).abs().amax(1, keepdim=True) < FAINT
    apart = (log_p - log_q).masked_fill(log_p == log_q, 0)  # also of two infinities
    size = torch.maximum(log_p, log_q) + torch.log(-torch.expm1(-apart.abs()))
    size = size.masked_fill(
        log_p > log_p.amax(1, keepdim=True) - 1, -math.inf
    )  # known by their rounding only
    largest = size.amax(1, keepdim=True)
    found = apart.sign() * torch.exp(size - largest.where(largest.isfinite(), 0))
    # Probabilities add up to 1: the likely classes have lost what the others gained.
    return found - found.sum(1, keepdim=True) * p, lost


def rival_loss(logits: Tensor, labels: Tensor, floor: float = 0.0) -> Tensor:
    """``-log(floor + 1 - max_{k != y} p_k)`` per image, (N,): the second term of MART's loss.

    logits: (N, K). labels: (N,) int64.
    """
    rival = logits.detach().scatter(1, labels[:, None], -math.inf).argmax(1, keepdim=True)
    others = logits.scatter(1, rival, -math.inf).logsumexp(1)
    # 1 - p is the sigmoid of the others' log-odds over the rival; 1 - p itself is 0 from a gap of 17 on.
    log_rest = F.logsigmoid(others - logits.gather(1, rival).squeeze(1))
    return -(torch.logaddexp(log_rest, torch.full_like(log_rest, math.log(floor))) if floor > 0 else log_rest)


@dataclass(frozen=True)
class AttackGoal:
    """The function of the network's logits that the attack increases, or decreases if `targeted`.

    Attributes:
        loss: "ce" cross-entropy, "kl" Kullback-Leibler divergence from `target`, "margin" the Carlini-Wagner
            margin, "dlr" the difference of logits ratio.
        target: (N,) int64 classes; for "ce" also (N, K) probabilities; for "kl" (N, K) log-probabilities.
        targeted: move towards `target` instead of away from it.
        track: also count, per image, the iterates at which the network predicts the goal's class
            (`AttackResult.kept`).
        confidence: upper limit of the value: an image that reaches it is driven no further. C&W's kappa, for
            "margin".
    """

    loss: AttackLoss
    target: Tensor
    targeted: bool = False
    track: bool = False
    confidence: float = math.inf

    def __post_init__(self) -> None:
        """Raises UserError for probabilities as the target of a loss of one class."""
        if self.loss in ("margin", "dlr") and self.target.dim() == 2:
            raise UserError(
                f"attack loss {self.loss} needs one class per image, got labels of shape "
                f"{tuple(self.target.shape)}; use ce, or labels.argmax(1)"
            )

    @property
    def kind(self) -> GoalKind:
        """All fields but the target. Goals of one kind share compiled code."""
        return self.loss, self.targeted, self.track, self.confidence

    @classmethod
    def from_kind(cls, kind: GoalKind, target: Tensor) -> "AttackGoal":
        """The goal of `kind` with `target`."""
        loss, targeted, track, confidence = kind
        return cls(loss, target, targeted, track, confidence)

    def per_image(self, logits: Tensor) -> Tensor:
        """The value to maximise, (N,), at least float32.

        Attacks differentiate its sum: a mean would divide each gradient by N, and half precision underflows.
        """
        logits = wide(logits)
        if self.loss == "kl":
            value = kl_from_log_probs(self.target, logits)
        elif self.loss == "margin":
            value = margin(logits, self.target)
        elif self.loss == "dlr":
            value = dlr(logits, self.target)
        elif self.target.dim() == 2:
            value = soft_cross_entropy(logits, self.target)
        else:
            value = F.cross_entropy(logits, self.target, reduction="none")
        value = -value if self.targeted else value
        return value if self.confidence == math.inf else value.clamp_max(self.confidence)

    def order(self, logits: Tensor) -> Tensor:
        """(N,) numbers that compare as `per_image` does, also where the cross-entropy rounds to 0."""
        if self.loss != "ce" or self.target.dim() == 2 or self.confidence < math.inf:
            return self.per_image(logits)
        value = cross_entropy_order(wide(logits), self.target)
        return -value if self.targeted else value

    def logit_grad(self, logits: Tensor, *, rescale: bool = False, loss_scale: float = 1.0) -> Tensor:
        """Gradient of ``per_image(logits).sum()`` at `logits`, in their dtype, in closed form.

        Args:
            rescale: multiply each image's gradient by the power of two that brings it to order one, so that
                it does not underflow in half precision on its way to the pixels. Exact only while images do
                not mix, so not with batch norm in train mode.
            loss_scale: one factor for all images, applied before rounding to the dtype of the logits.
        """
        # A value that half precision has flushed to zero cannot be scaled back.
        source = logits.detach() if loss_scale == 1.0 else wide(logits.detach())
        grad = attack_logit_grad(
            source, self.target, loss=self.loss, rescale=rescale, targeted=self.targeted
        ).grad
        if rescale and self.target.dim() == 2:  # for classes, the operator does this
            log_q = self.target if self.loss == "kl" else self.target.log()
            faint, lost = scaled_softmax_difference(source, log_q)
            grad = torch.where(lost, (-faint if self.targeted else faint).to(grad.dtype), grad)
        if self.confidence < math.inf:
            grad = grad.masked_fill((self.per_image(source) >= self.confidence)[:, None], 0)
        return grad if loss_scale == 1.0 else (grad * loss_scale).to(logits.dtype)

    @property
    def open_ended(self) -> bool:
        """True if no image is ever `satisfied`."""
        return self.confidence == math.inf and not (self.targeted and self.loss == "ce")

    def satisfied(self, logits: Tensor) -> Tensor:
        """(N,) bool: the goal is met, so a zero gradient is intended.

        The value has reached `confidence`, or a targeted "ce" has reached its target.
        """
        if self.targeted and self.loss == "ce":
            return self.reached(logits)
        return self.per_image(logits) >= self.confidence

    def reached(self, logits: Tensor) -> Tensor:
        """(N,) bool: the prediction is no longer the goal's class, or is its target if `targeted`."""
        classes = self.target if self.target.dim() == 1 else self.target.argmax(1)
        predictions = logits.argmax(1)
        return predictions == classes if self.targeted else predictions != classes

    def clone(self) -> "AttackGoal":
        """A copy whose target autograd may save, even if it was made under ``inference_mode``."""
        return replace(self, target=self.target.clone())
