"""The soft margin and its gradient: several short rows per program, or one long row in two passes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdynat.kernels._launch import on_device_of

LONGEST_HELD = 4096  # classes up to which a program holds whole rows
BLOCK_SIZE = 512  # values of short rows per program
CHUNK = 2048  # values of a longer row at a time


@triton.jit
def load_own(logits_ptr, labels_ptr, row, classes, WIDE: tl.constexpr):
    """The labels of the rows and their logits; -1 and NaN for a class out of range."""
    label = tl.load(labels_ptr + row)
    label = tl.where((label >= 0) & (label < classes), label, -1).to(tl.int32)
    at = logits_ptr + row.to(tl.int64) * classes + label
    return label, tl.load(at, mask=label >= 0, other=float("nan")).to(WIDE)


@triton.jit
def load_others(logits_ptr, row, k, classes, label, WIDE: tl.constexpr):
    """The values [row, k]; -inf for the label and beyond the last class."""
    at = logits_ptr + row.to(tl.int64)[:, None] * classes + k[None, :]
    z = tl.load(at, mask=k[None, :] < classes, other=float("-inf")).to(WIDE)
    # Not part of the mask, where it would keep several values from being loaded as one.
    return tl.where(k[None, :] == label[:, None], float("-inf"), z)


@triton.jit
def store_margin(margin_ptr, row, own, top, total, temperature):
    """Store the margins; returns the sums, NaN for invalid rows."""
    # `top` is infinite or NaN where one of the others is +inf or NaN (which the sum holds too), or all of
    # them are -inf.
    total = tl.where((own < float("inf")) & (tl.abs(top) < float("inf")), total, float("nan"))
    tl.store(margin_ptr + row, (own - top) - tl.log(total) / temperature)
    return total


@triton.jit
def store_grad(grad_ptr, row, k, classes, label, e, total):
    """Store 1 at the label, and minus the softmax elsewhere."""
    at_label = tl.where(total == total, 1.0, total)[:, None]
    grad = tl.where(k[None, :] == label[:, None], at_label, -e / total[:, None])
    tl.store(grad_ptr + row.to(tl.int64)[:, None] * classes + k[None, :], grad, mask=k[None, :] < classes)


@triton.jit
def soft_margin_kernel(
    logits_ptr,  # (n, classes) any float
    labels_ptr,  # (n,) int64
    margin_ptr,  # (n,) float64 for float64 logits, else float32
    grad_ptr,  # (n, classes) of that dtype, unused unless HAS_GRAD
    n,
    classes,
    temperature: tl.float64,  # an unannotated float would arrive rounded to float32
    HAS_GRAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # power of two >= classes
):
    """Grid: (cdiv(n, ROWS),)."""
    wide: tl.constexpr = margin_ptr.dtype.element_ty
    t = tl.full((1,), temperature, wide)
    # The last program repeats the last row, to the same result: no access needs a mask for rows.
    row = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS), n - 1)
    k = tl.arange(0, BLOCK)
    label, own = load_own(logits_ptr, labels_ptr, row, classes, wide)
    z = load_others(logits_ptr, row, k, classes, label, wide)
    top = tl.max(z, axis=1)
    e = tl.exp((z - top[:, None]) * t)
    total = store_margin(margin_ptr, row, own, top, tl.sum(e, axis=1), t)
    if HAS_GRAD:
        store_grad(grad_ptr, row, k, classes, label, e, total)


@triton.jit
def soft_margin_long_kernel(
    logits_ptr,  # as above
    labels_ptr,
    margin_ptr,
    grad_ptr,
    classes,
    temperature: tl.float64,
    HAS_GRAD: tl.constexpr,
    CHUNK: tl.constexpr,
    END: tl.constexpr,  # multiple of CHUNK >= classes
):
    """Grid: (n,). The second pass, for the gradient, finds the row in the caches."""
    wide: tl.constexpr = margin_ptr.dtype.element_ty
    t = tl.full((1,), temperature, wide)
    row = tl.program_id(0) + tl.arange(0, 1)
    label, own = load_own(logits_ptr, labels_ptr, row, classes, wide)
    top = tl.full((1,), float("-inf"), wide)
    total = tl.full((1,), 0.0, wide)
    for start in range(0, END, CHUNK):
        k = start + tl.arange(0, CHUNK)
        z = load_others(logits_ptr, row, k, classes, label, wide)
        larger = tl.maximum(top, tl.max(z, axis=1))
        shift = tl.where(larger == float("-inf"), 0.0, larger)  # nothing but -inf so far: the sum stays 0
        total = total * tl.exp((top - shift) * t) + tl.sum(tl.exp((z - shift[:, None]) * t), axis=1)
        top = larger
    total = store_margin(margin_ptr, row, own, top, total, t)
    if HAS_GRAD:
        for start in range(0, END, CHUNK):
            k = start + tl.arange(0, CHUNK)
            z = load_others(logits_ptr, row, k, classes, label, wide)
            e = tl.exp((z - top[:, None]) * t)
            store_grad(grad_ptr, row, k, classes, label, e, total)


def soft_margin(logits: Tensor, labels: Tensor, temperature: float, with_grad: bool) -> tuple[Tensor, Tensor]:
    """Launch on the current stream; returns (margin, grad), grad of size 0 unless `with_grad`."""
    logits, labels = logits.contiguous(), labels.contiguous()
    n, classes = logits.shape
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    margin = logits.new_empty(n, dtype=wide)
    grad = logits.new_empty((n, classes) if with_grad else (0,), dtype=wide)
    if n == 0:
        return margin, grad
    tensors = (logits, labels, margin, grad)
    with on_device_of(logits):
        if classes <= LONGEST_HELD:
            block = triton.next_power_of_2(classes)
            rows = max(1, BLOCK_SIZE // block)
            soft_margin_kernel[(triton.cdiv(n, rows),)](
                *tensors,
                n,
                classes,
                temperature,
                HAS_GRAD=with_grad,
                ROWS=rows,
                BLOCK=block,
                num_warps=max(4, block // 512),
                enable_fp_fusion=False,
            )
        else:
            end = triton.cdiv(classes, CHUNK) * CHUNK
            soft_margin_long_kernel[(n,)](
                *tensors,
                classes,
                temperature,
                HAS_GRAD=with_grad,
                CHUNK=CHUNK,
                END=end,
                num_warps=8,
                enable_fp_fusion=False,
            )
    return margin, grad
