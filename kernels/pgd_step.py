"""One L-inf PGD step as one kernel: three reads and one write per pixel."""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def pgd_step_linf_kernel(
    x_adv_ptr,  # (numel,) float32 or float64, dense
    grad_ptr,  # (numel,) any float, in the same order
    x0_ptr,  # (numel,) dtype of x_adv, in the same order
    out_ptr,  # (numel,) dtype of x_adv; not aliased with the inputs
    numel,
    step_size: tl.float64,  # an unannotated float would reach float64 images rounded to float32
    eps: tl.float64,
    lo: tl.float64,
    hi: tl.float64,
    BLOCK: tl.constexpr,
):
    """Write clamp(clamp(x_adv + step_size * sign(grad), x0 - eps, x0 + eps), lo, hi)."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    x_adv = tl.load(x_adv_ptr + offsets, mask=mask)
    grad = tl.load(grad_ptr + offsets, mask=mask)
    x0 = tl.load(x0_ptr + offsets, mask=mask)

    dtype = x_adv.dtype
    step_size = tl.full((1,), step_size, dtype)
    eps = tl.full((1,), eps, dtype)
    lo = tl.full((1,), lo, dtype)
    hi = tl.full((1,), hi, dtype)

    if grad.dtype.primitive_bitwidth == 16:
        grad = grad.to(tl.float32)  # exact; the interpreter of Triton 3.9 cannot compare bfloat16
    # Comparisons with NaN are false: a NaN gradient does not move the pixel. The product is exact, FMA or not.
    sign = (grad > 0).to(dtype) - (grad < 0).to(dtype)
    x = x_adv + step_size * sign
    lower = x0 - eps
    upper = x0 + eps
    x = tl.where(x < lower, lower, x)
    x = tl.where(x > upper, upper, x)
    x = tl.where(x < lo, lo, x)
    x = tl.where(x > hi, hi, x)
    # Like torch.clamp with a NaN bound: the result is that NaN.
    x = tl.where(x0 == x0, x, x0)
    tl.store(out_ptr + offsets, x, mask=mask)


def pgd_step_linf(x_adv: Tensor, grad: Tensor, x0: Tensor, step_size: float, eps: float, lo: float, hi: float) -> Tensor:
    """Launch the kernel on the current stream and return a new tensor with the layout of `x_adv`.

    All three tensors must be dense and of one memory order.
    """
    out = torch.empty_like(x_adv)
    numel = out.numel()
    if numel == 0:
        return out
    # Triton launches on the current device, which need not be the tensors'.
    guard = torch.cuda.device(x_adv.device) if x_adv.is_cuda else contextlib.nullcontext()
    with guard:
        pgd_step_linf_kernel[(triton.cdiv(numel, BLOCK),)](x_adv, grad, x0, out, numel, step_size, eps, lo, hi, BLOCK=BLOCK)
    return out
