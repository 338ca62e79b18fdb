"""Cross-entropy against a guide network's label: loss, gradient, predictions and counts in one pass."""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdynat.ops._register import register_operator
from fastdynat.ops._rows import (
    bad_classes,
    check_class_indices,
    check_logits,
    check_per_row,
    check_same_device,
    save_grad,
    scale_grad,
    wide_dtype,
)
from fastdynat.ops._select import select

OP = "dynamic_label_cross_entropy"
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
Reduction = Literal["none", "mean", "sum"]
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class DynamicLabelLoss(NamedTuple):
    """The loss against dynamic labels, with predictions and counts of the same logits.

    Attributes:
        loss: scalar, or (N,) with reduction "none"; float64 for float64 logits, else float32. All other
            fields are detached.
        predictions: (N,) int64, the target's arg-max.
        dynamic_labels: (N,) int64, the guide's arg-max, or its classes.
        target_correct: scalar int64, number of predictions equal to `labels`; None without labels.
        guide_correct: the same for the dynamic labels.
    """

    loss: Tensor
    predictions: Tensor
    dynamic_labels: Tensor
    target_correct: Tensor | None
    guide_correct: Tensor | None


def _eager(
    target_logits: Tensor,
    guide: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    soft: bool,
    temperature: float,
    label_smoothing: float,
    reduction: int,
    with_grad: bool,
) -> Outputs:
    """The reference: differentiable by autograd, and with its gradient in closed form if `with_grad`."""
    wide = wide_dtype(target_logits)
    n, k = target_logits.shape
    predictions = target_logits.detach().argmax(1)
    dynamic = guide.clone() if guide.dtype == torch.int64 else guide.argmax(1)
    top = target_logits.detach().amax(1).to(wide)
    z = target_logits.to(wide) + (top - top + bad_classes(OP, "guide", target_logits, dynamic))[:, None]
    log_q = F.log_softmax(z, 1)
    label = dynamic.clamp(0, k - 1)[:, None]
    if soft:
        p = F.softmax(guide.to(wide) / temperature, 1)
        hard_loss = -torch.where(p == 0, 0, p * log_q).sum(1)
    else:
        # Not log_q at the label: the derivative of that is p - 1, which vanishes where p is nearly 1.
        p = F.one_hot(label[:, 0], k).to(wide)
        rest = z.scatter(1, label, float("-inf"))
        alone = (rest == float("-inf")).all(1)  # where logsumexp has no derivative
        log_rest = rest.masked_fill(alone[:, None], 0).logsumexp(1).masked_fill(alone, float("-inf"))
        hard_loss = F.softplus(log_rest - z.gather(1, label)[:, 0], threshold=80)
    loss = hard_loss
    if label_smoothing > 0:
        loss = -label_smoothing / k * log_q.sum(1)
        if label_smoothing < 1:  # else 0 * inf would be NaN
            loss = loss + (1 - label_smoothing) * hard_loss
    scale = torch.ones_like(top) if weights is None else weights.detach()
    loss = loss * scale
    if reduction == 1:
        scale = scale / n
    grad = loss.new_empty(0)
    if with_grad:
        q = log_q.exp()
        grad = q - (p * (1 - label_smoothing) + label_smoothing / k)
        if not soft:
            grad = grad.scatter(
                1, label, label_smoothing / k * (k - 1) - q.scatter(1, label, 0).sum(1, keepdim=True)
            )
        grad = grad * scale[:, None]
    if reduction != 0:
        loss = loss.mean() if reduction == 1 else loss.sum()
    counts = dynamic.new_empty(0)
    if labels is not None:
        counts = torch.stack([(predictions == labels).sum(), (dynamic == labels).sum()])
    return loss, counts, predictions, dynamic, grad


def _reference(*args: Any) -> Outputs:
    inputs: list[Any] = [*args[:-1], False]
    return _eager(*inputs)


def _fake(target_logits: Tensor, labels: Tensor | None, reduction: int, with_grad: bool, **_: Any) -> Outputs:
    n, k = target_logits.shape
    wide = wide_dtype(target_logits)
    loss = target_logits.new_empty((n,) if reduction == 0 else (), dtype=wide)
    counts = target_logits.new_empty(0 if labels is None else 2, dtype=torch.int64)
    classes = target_logits.new_empty(n, dtype=torch.int64)
    grad = target_logits.new_empty((n, k) if with_grad else (0,), dtype=wide)
    return loss, counts, classes, torch.empty_like(classes), grad


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    _, counts, predictions, dynamic_labels, grad = output
    save_grad(ctx, grad, (counts, predictions, dynamic_labels), inputs[0].dtype, OP)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    return scale_grad(ctx, grad_loss), *(None,) * 8


IMPLEMENTATIONS = register_operator(
    OP,
    eager=_eager,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    reference=_reference,
)


def dynamic_label_cross_entropy(
    target_logits: Tensor,
    guide: Tensor,
    *,
    labels: Tensor | None = None,
    weights: Tensor | None = None,
    soft: bool = False,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    backend: str = "auto",
) -> DynamicLabelLoss:
    """Cross-entropy of the target's logits z against the guide's label t: -sum_k t_ik log softmax(z_i)_k.

    t is one-hot at the guide's arg-max (the first of equal maxima; NaN counts as the largest, as in
    torch.argmax), or with `soft` the guide's softmax; both are smoothed by `label_smoothing`. The gradient
    with respect to z, softmax(z) - t, comes from the same pass. For a hard label, the label's entry is
    computed as minus the sum of the others, so that it does not vanish before they do. `guide` gets no
    gradient. Source: the target network's loss of DYNAT (arXiv 2408.13102); weights as in GAIRAT (arXiv
    2010.01736) and MAIL (arXiv 2106.07904).

    Exact for any finite logits: a label 1e4 below the maximum has loss 1e4. A class with logit -inf has
    probability 0 and adds nothing where t is 0. A row that holds NaN or +inf, or only -inf, has a NaN loss
    and gradient, as has a row whose soft label comes from such a row of `guide`; other rows are not affected.
    Second derivatives and torch.func need backend "eager".

    Args:
        target_logits: (N, K), float32, float64, bfloat16 or float16. Computed in float32 at least.
        guide: (N, K) logits of any of these dtypes, or (N,) int64 classes. Backends "cpp" and on
            the CPU "eager" raise for a class outside [0, K); others, which would have to wait for the device,
            and compiled code return NaN.
        labels: (N,) int64, the true classes, used to count correct predictions only.
        weights: (N,) float32, factors of the rows' losses; they get no gradient.
        soft: use softmax(guide / temperature) instead of its arg-max. Of logarithms of probabilities, that is
            the probabilities; log 0 = -inf is none.
        temperature: of `soft`, > 0.
        label_smoothing: s in [0, 1]: t becomes t * (1 - s) + s / K.
        reduction: "mean" (1/N sum_i w_i loss_i: not divided by the sum of the weights), "sum", or "none".
        backend: "auto" or one of `fastdynat.ops.BACKENDS`.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit; UserError for an unknown backend.
        RuntimeError: the backend asked for cannot run here, or a class is out of range (see `guide`).
    """
    check_logits(OP, "target_logits", target_logits, 1)
    if guide.dtype == torch.int64:
        check_per_row(OP, "guide (of int64 classes)", guide, target_logits)
        if soft:
            raise ValueError(f"{OP}: soft=True needs the guide's logits (N, K), got int64 classes")
    else:
        check_logits(OP, "guide", guide, 1)
        if guide.shape != target_logits.shape:
            raise ValueError(
                f"{OP}: guide has shape {tuple(guide.shape)} but target_logits has "
                f"shape {tuple(target_logits.shape)}"
            )
        check_same_device(OP, "guide", guide, target_logits)
    if labels is not None:
        check_class_indices(OP, "labels", labels, target_logits)
    if weights is not None:
        check_per_row(OP, "weights", weights, target_logits)
        weights = weights.detach().to(wide_dtype(target_logits))
    if not 0 < temperature < float("inf"):
        raise ValueError(f"{OP}: temperature must be positive and finite, got {temperature}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{OP}: label_smoothing must be in [0, 1], got {label_smoothing}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{OP}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    run = select(OP, IMPLEMENTATIONS, backend, target_logits)
    loss, counts, predictions, dynamic_labels, _ = run(
        target_logits,
        guide.detach(),
        labels,
        weights,
        soft,
        float(temperature),
        float(label_smoothing),
        REDUCTIONS[reduction],
        torch.is_grad_enabled() and target_logits.requires_grad,
    )
    target_correct, guide_correct = counts.unbind() if labels is not None else (None, None)
    return DynamicLabelLoss(loss, predictions, dynamic_labels, target_correct, guide_correct)
