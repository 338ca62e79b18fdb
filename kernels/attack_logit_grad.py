"""The gradient of an attack's loss at the logits as one kernel, which reads each row once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdynat.kernels._launch import on_device_of
from fastdynat.kernels._rows import PROGRAMS, block_of, rounded_quotient

TILE = 4096  # bytes of rows, as computed with, that one program holds where rows are short
CE, KL, MARGIN, DLR, SOFT_CE = 0, 1, 2, 3, 4


@triton.jit
def inverse_power_of_two(x):
    """2^-e for x = m 2^e with m in [0.5, 1), within normal numbers; 1 for 0, NaN and infinity."""
    usable = (x > 0) & (x < float("inf"))
    if x.dtype == tl.float64:
        exponent = (x.to(tl.int64, bitcast=True) >> 52) & 0x7FF
        inverse = tl.where(exponent > 2044, 1, 2045 - exponent)
        power = (inverse << 52).to(tl.float64, bitcast=True)
    else:
        exponent = (x.to(tl.int32, bitcast=True) >> 23) & 0xFF
        inverse = tl.where(exponent > 252, 1, 253 - exponent)
        power = (inverse << 23).to(tl.float32, bitcast=True)
    return tl.where(usable, power, 1.0)


@triton.jit
def first_largest(z, k, candidates):
    """The largest candidate of each row and the first class that has it; (-inf, large) if there is none."""
    best = tl.max(tl.where(candidates, z, float("-inf")), axis=1)
    at = tl.min(tl.where(candidates & (z == best[:, None]), k, 2147483647), axis=1)
    return best, at


@triton.jit
def attack_logit_grad_kernel(
    logits_ptr,  # (n, classes), any float
    labels_ptr,  # (n,) int64, or (n, classes) any float for KL and SOFT_CE
    grad_ptr,  # (n, classes), dtype of logits
    value_ptr,  # (n,), float64 for float64 logits, else float32
    n,
    classes,
    sign,  # 1.0, or -1.0 towards the label
    LOSS: tl.constexpr,
    RESCALE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradient and the loss of ROWS rows. Grid: blocks of rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK)[None, :]
    here = row < n
    known = here[:, None] & (k < classes)
    offsets = row[:, None] * classes + k
    z = tl.load(logits_ptr + offsets, mask=known, other=float("-inf"))
    z = tl.where(here[:, None], z.to(value_ptr.dtype.element_ty), 0.0)
    top = tl.max(z, axis=1)
    broken = tl.max((known & (z != z)).to(tl.int32), axis=1) > 0
    bad = tl.where(broken, float("nan"), top - top)  # NaN also where the maximum is infinite
    shifted = z - top[:, None]

    if (LOSS == 1) or (LOSS == 4):
        target = tl.load(labels_ptr + offsets, mask=known, other=float("-inf") if LOSS == 1 else 0.0).to(
            z.dtype
        )
        if LOSS == 1:
            target = tl.where(target > 0, 0.0, target)
        q = tl.exp(target) if LOSS == 1 else target
        e = tl.where(known, tl.exp(shifted), 0.0)
        total = tl.sum(e, axis=1)
        mass = tl.sum(q, axis=1)
        log_p = shifted - tl.log(total)[:, None]
        term = q * ((target if LOSS == 1 else 0.0) - log_p)
        value = tl.sum(tl.where(known & (q != 0), term, 0.0), axis=1)
        grad = tl.where(known, e * (mass / total)[:, None] - q, 0.0)
        if RESCALE:
            grad = grad * inverse_power_of_two(tl.max(tl.abs(grad), axis=1))[:, None]
    else:
        label = tl.load(labels_ptr + row, mask=here, other=0)
        bad = tl.where((label < 0) | (label >= classes), float("nan"), bad)
        is_label = k == label[:, None]
        ours = tl.sum(tl.where(is_label, z, 0.0), axis=1)
        best, other = first_largest(z, k, known & (k != label[:, None]))
        if LOSS == 0:
            e = tl.where(known, tl.exp(shifted), 0.0)
            inverse = 1.0 / tl.sum(e, axis=1)
            rest = tl.sum(tl.where(is_label, 0.0, e), axis=1) * inverse
            grad = tl.where(is_label, -rest[:, None], e * inverse[:, None])
            # The logits of the others against the label's: a small loss is not the difference of two large
            # numbers.
            lead = best - ours
            reach = tl.maximum(best, ours)
            faint = tl.where(
                known & (k != label[:, None]),
                tl.exp(z - tl.where(best > float("-inf"), best, 0.0)[:, None]),
                0.0,
            )
            spread = tl.sum(faint, axis=1)
            small = spread * tl.exp(best - reach)
            # log(small + exp(ours - reach)), relative to ours; log1p by hand, since small may be below one
            # ulp of 1
            base = tl.exp(ours - reach)
            plus = small / base
            u = 1.0 + plus
            log1p = tl.where(u == 1.0, plus, tl.log(u) * (plus / tl.where(u == 1.0, 1.0, u - 1.0)))
            value = tl.where(lead > 20.0, lead + tl.log(spread), tl.where(best == float("-inf"), 0.0, log1p))
            if RESCALE:
                made = (rest < 5.421010862427522e-20) & (best > float("-inf"))
                faint = tl.where(is_label, -spread[:, None], faint)
                grad = tl.where(made[:, None], faint, grad)
                grad = grad * inverse_power_of_two(tl.where(made, spread, rest))[:, None]
        else:
            value = best - ours
            grad = tl.where(k == other[:, None], 1.0, 0.0) - tl.where(is_label, 1.0, 0.0)
            grad = grad.to(z.dtype)
            if LOSS == 3:
                high, first = first_largest(z, k, known)
                _, second = first_largest(z, k, known & (k != first[:, None]))
                low, third = first_largest(z, k, known & (k != first[:, None]) & (k != second[:, None]))
                gap = high - low
                flat = gap == 0.0
                gap = tl.where(flat, 1.0, gap)
                # Where the two differences are equal, their terms must cancel: RESCALE would make a gradient
                # of what rounding leaves.
                value = tl.where(flat, 0.0, rounded_quotient(value, gap))
                slope = tl.where(k == third[:, None], 1.0, 0.0) - tl.where(k == first[:, None], 1.0, 0.0)
                grad = tl.where(
                    flat[:, None],
                    0.0,
                    (grad + tl.where(slope != 0, value[:, None] * slope, 0.0)) / gap[:, None],
                )
            if RESCALE:
                grad = grad * inverse_power_of_two(tl.max(tl.abs(grad), axis=1))[:, None]
    grad = (grad + bad[:, None]) * sign
    tl.store(value_ptr + row, (value + bad) * sign, mask=here)
    tl.store(grad_ptr + offsets, grad.to(grad_ptr.dtype.element_ty), mask=known)


def attack_logit_grad(
    logits: Tensor, labels: Tensor, loss: int, rescale: bool, targeted: bool
) -> tuple[Tensor, Tensor]:
    """Launch the kernel on the current stream; returns (grad, value)."""
    logits, labels = logits.contiguous(), labels.contiguous()
    n, classes = logits.shape
    grad = torch.empty_like(logits)
    value = logits.new_empty(n, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
    if n == 0:
        return grad, value
    block = block_of(classes)
    # Rows of a small batch are spread over the GPU before they are gathered into full tiles.
    rows = max(
        1, min(TILE // (block * value.element_size()), triton.next_power_of_2(triton.cdiv(n, PROGRAMS)))
    )
    with on_device_of(logits):
        attack_logit_grad_kernel[(triton.cdiv(n, rows),)](
            logits,
            labels,
            grad,
            value,
            n,
            classes,
            -1.0 if targeted else 1.0,
            LOSS=loss,
            RESCALE=rescale,
            ROWS=rows,
            BLOCK=block,
            num_warps=max(1, min(16, rows * block // 256)),
            enable_fp_fusion=False,
        )
    return grad, value
