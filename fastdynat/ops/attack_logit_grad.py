"""The gradient of an attack's loss with respect to the logits in closed form, in one pass over each row."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdynat.ops._register import register_operator
from fastdynat.ops._rows import bad_classes, check_class_indices, check_logits, check_same_device, wide_dtype
from fastdynat.ops._select import select

OP = "attack_logit_grad"
LOSSES = ("ce", "kl", "margin", "dlr")
SOFT_CE = len(LOSSES)  # the code of "ce" with probabilities
FAINT = 2.0**-64  # a row whose largest entry is below is recomputed from the differences of logits


class AttackGrad(NamedTuple):
    """The gradient that an attack passes back into the network.

    Attributes:
        grad: (N, K) in the logits' dtype, of the sum over images.
        loss: (N,) the maximised loss; float64 for float64 logits, else float32.
    """

    grad: Tensor
    loss: Tensor


def inverse_power_of_two(values: Tensor) -> Tensor:
    """2^-e for values = m 2^e with m in [0.5, 1), within normal numbers; 1 for 0, NaN and infinity."""
    usable = (values > 0) & values.isfinite()
    smallest = -126 if values.dtype == torch.float32 else -1022
    exponent = torch.frexp(torch.where(usable, values, 0.5))[1].clamp(smallest, -smallest)
    return torch.ldexp(torch.ones_like(values), -exponent)


def _eager(logits: Tensor, labels: Tensor, loss: int, rescale: bool, targeted: bool) -> tuple[Tensor, Tensor]:
    """The reference."""
    z = logits.to(wide_dtype(logits))
    k = z.shape[1]
    top = z.amax(1, keepdim=True)
    z = z + (top - top)  # NaN where a row holds NaN, +inf, or nothing but -inf
    if loss in (LOSSES.index("kl"), SOFT_CE):
        log_p, target = F.log_softmax(z, 1), labels.to(z.dtype)
        if loss != SOFT_CE:
            target = target.clamp_max(0)
        q = target.exp() if loss != SOFT_CE else target
        if loss == SOFT_CE:
            value = -torch.where(q == 0, 0, q * log_p).sum(1)
        else:
            value = torch.where(q == 0, 0, q * (target - log_p)).sum(1)
        grad = log_p.exp() * q.sum(1, keepdim=True) - q
    else:
        label = labels.clamp(0, k - 1)[:, None]
        z = z + bad_classes(OP, "labels", logits, labels)[:, None]
        others = z.scatter(1, label, float("-inf"))
        best, second = others.max(1, keepdim=True)
        # If all others are -inf they tie with the label's entry, which is -inf here, too.
        second = torch.where(second == label, (label == 0).long(), second)
        ours = z.gather(1, label)
        value = (best - ours).squeeze(1)
        if loss == LOSSES.index("ce"):
            rest = torch.exp(z - z.logsumexp(1, keepdim=True)).scatter(1, label, 0)
            grad = rest.scatter(1, label, -rest.sum(1, keepdim=True))
            value = F.softplus((others.logsumexp(1, keepdim=True) - ours).squeeze(1), threshold=80)
            if rescale:
                faint = torch.exp(others - best)
                faint = faint.scatter(1, label, -faint.scatter(1, label, 0).sum(1, keepdim=True))
                possible = best.isfinite()  # else no other class has any probability
                grad = torch.where((grad.abs().amax(1, keepdim=True) < FAINT) & possible, faint, grad)
        else:
            one = torch.ones_like(best)
            grad = torch.zeros_like(z).scatter(1, second, one).scatter_add(1, label, -one)
            if loss == LOSSES.index("dlr"):
                order = z.sort(dim=1, descending=True, stable=True).indices[:, :3]
                first, third = order[:, :1], order[:, 2:]
                gap = z.gather(1, first) - z.gather(1, third)
                flat = gap == 0
                divisor = torch.where(flat, one, gap)
                ratio = (best - ours) / divisor
                grad = (
                    grad - torch.zeros_like(z).scatter_add(1, first, ratio).scatter_add(1, third, -ratio)
                ) / divisor
                grad = torch.where(flat, 0, grad)
                value = torch.where(flat, 0, ratio).squeeze(1)
            grad = torch.where(z.isnan(), z, grad)
    if rescale:
        grad = grad * inverse_power_of_two(grad.abs().amax(1, keepdim=True))
    if targeted:
        grad, value = -grad, -value
    return grad.to(logits.dtype), value


def _fake(logits: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    return grad, logits.new_empty(logits.shape[0], dtype=wide_dtype(logits))


IMPLEMENTATIONS = register_operator(OP, eager=_eager, fake=_fake)


def attack_logit_grad(
    logits: Tensor,
    labels: Tensor,
    *,
    loss: str = "ce",
    rescale: bool = False,
    targeted: bool = False,
    backend: str = "auto",
) -> AttackGrad:
    """The gradient of sum_i loss(z_i, label_i) with respect to the logits z, detached, and the losses.

    - "ce": cross-entropy; gradient softmax(z) - t. For a class label its own entry is minus the sum of the
      others, never p - 1, which vanishes in half precision from p = 0.998 on.
    - "kl": KL(q || softmax(z)) with q = exp(labels); gradient softmax(z) - q.
    - "margin": max_{k != y} z_k - z_y (Carlini & Wagner 2017).
    - "dlr": (max_{k != y} z_k - z_y) / (z_(1) - z_(3)), the difference of logits ratio (Croce & Hein 2020,
      arXiv 2003.01690, eq. 6), its denominator differentiated too; 0 with gradient 0 where the denominator is
      0.

    A log-probability above 0 counts as 0. Of equal maxima the first counts. A row that holds NaN or +inf (or
    for class labels, a class outside [0, K)) has a NaN loss and gradient; backends "cpp" and on the CPU
    "eager" raise for such a class. -inf means probability 0.

    `rescale` multiplies each row by a power of two that brings its largest entry to [0.5, 1), if that is a
    normal number. The gradients of an image then survive 16-bit arithmetic in the network's backward pass,
    and are otherwise the same up to that factor, on which neither the sign step nor a normalised one depends.
    That holds only while images do not mix on their way back: it is wrong for a network in batch norm's train
    mode. Where a class label's gradient is so faint (below 2^-64) that float32 itself loses it, it is
    computed from the logits' differences instead, so that a gap of 1e4 still has its direction.

    Args:
        logits: (N, K), float32, float64, bfloat16 or float16; computed in float32 at least. K >= 2, for "dlr"
            K >= 3.
        labels: (N,) int64 classes; for "ce" also (N, K) probabilities; for "kl" (N, K) log-probabilities.
        loss: one of the names above.
        rescale: see above; zero rows stay zero.
        targeted: negate gradient and loss: drive towards the label.
        backend: "auto" or one of `fastdynat.ops.BACKENDS`.

    Raises:
        ValueError: shapes, dtypes, devices or the loss's name do not fit; UserError for an unknown backend.
        RuntimeError: the backend asked for cannot run here.
    """
    if loss not in LOSSES:
        raise ValueError(f"{OP}: loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    check_logits(OP, "logits", logits, 3 if loss == "dlr" else 2)
    code = LOSSES.index(loss)
    if loss == "kl" or (loss == "ce" and labels.dim() == 2):
        what = "log-probabilities" if loss == "kl" else "probabilities"
        if labels.shape != logits.shape or not labels.is_floating_point():
            got = f"{labels.dtype} {tuple(labels.shape)}"
            raise ValueError(f"{OP}: labels must be {what} of shape {tuple(logits.shape)}, got {got}")
        check_same_device(OP, "labels", labels, logits)
        code = code if loss == "kl" else SOFT_CE
    else:
        check_class_indices(OP, "labels", labels, logits)
    run = select(OP, IMPLEMENTATIONS, backend, logits)
    return AttackGrad(*run(logits.detach(), labels.detach(), code, rescale, targeted))
