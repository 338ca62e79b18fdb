"""Cross-entropy with dynamic labels: one kernel that reads each row once, and one that sums."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdynat.kernels._launch import on_device_of
from fastdynat.kernels._rows import argmax_rows, blocks, log1p, wide_dtype


@triton.jit
def dynamic_label_cross_entropy_kernel(
    logits_ptr,  # (n, k) any float
    guide_ptr,  # (n, k) any float, or (n,) int64 if HARD_GUIDE
    weights_ptr,  # (n,) of the loss's dtype, unused unless WEIGHTED
    loss_ptr,  # (n,) float32 or float64: the type computed in
    predictions_ptr,  # (n,) int64
    dynamic_labels_ptr,  # (n,) int64
    grad_ptr,  # (n, k) of the loss's dtype, unused unless WITH_GRAD
    n,
    k,
    inverse_temperature: tl.float64,
    keep: tl.float64,  # 1 - s
    uniform: tl.float64,  # s / k
    grad_scale: tl.float64,
    HARD_GUIDE: tl.constexpr,
    SOFT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Per row: w * loss, grad_scale * w * gradient, and the two arg-maxes. Grid: (blocks of rows,)."""
    dtype = loss_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    cols = tl.arange(0, BLOCK_K)[None, :]
    real = cols < k
    mask = (rows < n) & real
    offsets = rows.to(tl.int64) * k + cols
    # Rows that do not exist are zeros, so that nothing of theirs is NaN; columns that do not exist are -inf.
    z = tl.load(logits_ptr + offsets, mask=mask, other=0.0).to(dtype)
    z = tl.where(real, z, float("-inf"))
    keep = tl.full((1, 1), keep, dtype)
    uniform = tl.full((1, 1), uniform, dtype)

    top, prediction = argmax_rows(z, cols)
    shifted = z - top
    e = tl.exp(shifted)
    others = tl.sum(tl.where(cols == prediction, 0.0, e), axis=1, keep_dims=True)
    others += top - top  # NaN where the maximum is infinite or NaN: all of that row becomes NaN

    if HARD_GUIDE:
        dynamic = tl.load(guide_ptr + rows, mask=rows < n, other=0)
        label = tl.where((dynamic >= 0) & (dynamic < k), dynamic, -1).to(tl.int32)
        others = tl.where(label < 0, float("nan"), others)
    else:
        guide = tl.load(guide_ptr + offsets, mask=mask, other=0.0).to(dtype)
        guide = tl.where(real, guide, float("-inf"))
        guide_top, label = argmax_rows(guide, cols)
        dynamic = label.to(tl.int64)
    inverse = 1.0 / (1.0 + others)
    is_label = cols == label
    if SOFT:
        p = tl.exp((guide - guide_top) * tl.full((1, 1), inverse_temperature, dtype))
        p = p / (tl.sum(p, axis=1, keep_dims=True) + (guide_top - guide_top))
    else:
        p = is_label.to(dtype)
    target = tl.where(real, p * keep + uniform, 0.0)
    # 0 * log 0 = 0: a class that has no weight may have no probability.
    cost = -tl.sum(tl.where(target == 0.0, 0.0, target * shifted), axis=1, keep_dims=True)
    grad = e * inverse - target
    if not SOFT:
        # Minus the sum of the other entries: p - 1 would vanish where p is nearly 1.
        e_label = tl.sum(tl.where(is_label, e, 0.0), axis=1, keep_dims=True)
        rest = tl.where(label == prediction, others, 1.0 + (others - e_label))
        grad = tl.where(is_label, uniform * (k - 1) - rest * inverse, grad)
    loss = log1p(others) + cost
    if WEIGHTED:
        weight = tl.load(weights_ptr + rows, mask=rows < n, other=0.0)
        loss *= weight
        grad *= weight
    row_mask = rows < n
    tl.store(loss_ptr + rows, loss, mask=row_mask)
    tl.store(predictions_ptr + rows, prediction.to(tl.int64), mask=row_mask)
    tl.store(dynamic_labels_ptr + rows, dynamic, mask=row_mask)
    if WITH_GRAD:
        tl.store(grad_ptr + offsets, grad * tl.full((1, 1), grad_scale, dtype), mask=mask)


@triton.jit
def reduce_kernel(
    row_loss_ptr,  # (n,)
    predictions_ptr,  # (n,) int64
    dynamic_labels_ptr,  # (n,) int64
    labels_ptr,  # (n,) int64, unused unless COUNT
    loss_ptr,  # scalar, unused unless REDUCE
    counts_ptr,  # (2,) int64, unused unless COUNT
    n,
    factor: tl.float64,
    REDUCE: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """factor * the sum of the losses, and the correct counts; one program, so that the order is fixed."""
    total = tl.zeros((BLOCK,), tl.float64)
    target_correct = tl.zeros((BLOCK,), tl.int64)
    guide_correct = tl.zeros((BLOCK,), tl.int64)
    start = 0
    while start < n:  # the interpreter cannot take n as the end of a range
        at = start + tl.arange(0, BLOCK)
        mask = at < n
        if REDUCE:
            total += tl.load(row_loss_ptr + at, mask=mask, other=0.0).to(tl.float64)
        if COUNT:
            labels = tl.load(labels_ptr + at, mask=mask, other=0)
            target_correct += (mask & (tl.load(predictions_ptr + at, mask=mask, other=0) == labels)).to(
                tl.int64
            )
            guide_correct += (mask & (tl.load(dynamic_labels_ptr + at, mask=mask, other=0) == labels)).to(
                tl.int64
            )
        start += BLOCK
    if REDUCE:
        tl.store(loss_ptr, (tl.sum(total) * factor).to(loss_ptr.dtype.element_ty))
    if COUNT:
        tl.store(counts_ptr, tl.sum(target_correct))
        tl.store(counts_ptr + 1, tl.sum(guide_correct))


def dynamic_label_cross_entropy(
    target_logits: Tensor,
    guide: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    soft: bool,
    temperature: float,
    label_smoothing: float,
    reduction: int,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch on the current stream; returns (loss, counts, predictions, dynamic_labels, grad), see
    fastdynat.ops.
    """
    logits, guide = target_logits.contiguous(), guide.contiguous()
    n, k = logits.shape
    wide = wide_dtype(logits)
    row_loss = logits.new_empty(n, dtype=wide)
    loss = row_loss if reduction == 0 else logits.new_empty((), dtype=wide)
    counts = logits.new_empty(0 if labels is None else 2, dtype=torch.int64)
    predictions = logits.new_empty(n, dtype=torch.int64)
    dynamic_labels = torch.empty_like(predictions)
    grad = logits.new_empty((n, k) if with_grad else (0,), dtype=wide)
    grid, sizes = blocks(n, k)
    mean = 1 / n if n else float("nan")
    with on_device_of(logits):
        if n:
            dynamic_label_cross_entropy_kernel[(grid,)](
                logits,
                guide,
                weights.contiguous() if weights is not None else row_loss,
                row_loss,
                predictions,
                dynamic_labels,
                grad,
                n,
                k,
                1 / temperature,
                1 - label_smoothing,
                label_smoothing / k,
                mean if reduction == 1 else 1.0,
                HARD_GUIDE=guide.dtype == torch.int64,
                SOFT=soft,
                WEIGHTED=weights is not None,
                WITH_GRAD=with_grad,
                enable_fp_fusion=False,
                **sizes,
            )
        if reduction != 0 or labels is not None:
            reduce_kernel[(1,)](
                row_loss,
                predictions,
                dynamic_labels,
                labels.contiguous() if labels is not None else predictions,
                loss,
                counts,
                n,
                mean if reduction == 1 else 1.0,
                REDUCE=reduction != 0,
                COUNT=labels is not None,
                BLOCK=1024,
                enable_fp_fusion=False,
            )
    return loss, counts, predictions, dynamic_labels, grad
