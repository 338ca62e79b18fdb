"""The L-inf PGD step: ascend along the gradient's sign, project onto the ball, clip to the pixel range."""

import torch
from torch import Tensor

from fastdynat.ops._select import select

IMAGE_DTYPES = (torch.float32, torch.float64)
GRAD_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ARGUMENTS = "(Tensor x_adv, Tensor grad, Tensor x0, float step_size, float eps, float lo, float hi) -> Tensor"
TAGS = (torch.Tag.pt2_compliant_tag,)


def _eager(x_adv: Tensor, grad: Tensor, x0: Tensor, step_size: float, eps: float, lo: float, hi: float) -> Tensor:
    """The reference: what every other implementation equals bit by bit."""
    # torch.sign says nothing about NaN; comparisons with NaN are false, so that pixel does not move.
    sign = (grad > 0).to(x_adv.dtype) - (grad < 0).to(x_adv.dtype)
    x = x_adv + step_size * sign
    x = torch.clamp(x, x0 - eps, x0 + eps)
    return torch.clamp(x, lo, hi)


def _triton(x_adv: Tensor, grad: Tensor, x0: Tensor, step_size: float, eps: float, lo: float, hi: float) -> Tensor:
    # Imported here because triton may be missing.
    from fastdynat.kernels import pgd_step

    return pgd_step.pgd_step_linf(x_adv, grad, x0, step_size, eps, lo, hi)


def _fake(x_adv: Tensor, grad: Tensor, x0: Tensor, step_size: float, eps: float, lo: float, hi: float) -> Tensor:
    return torch.empty_like(x_adv)


# csrc/ registers CPU and CUDA kernels for the first name, which go first; without them, eager serves every device.
for _name, _default in (("pgd_step_linf", _eager), ("pgd_step_linf_triton", _triton)):
    torch.library.define(f"fastdynat::{_name}", ARGUMENTS, tags=TAGS)
    torch.library.impl(f"fastdynat::{_name}", "default", _default)
    torch.library.register_fake(f"fastdynat::{_name}", _fake)


def _call_triton(x_adv: Tensor, grad: Tensor, x0: Tensor, step_size: float, eps: float, lo: float, hi: float) -> Tensor:
    """The launcher itself in eager mode; the dispatcher only where a compiler has to see one operator."""
    run = torch.ops.fastdynat.pgd_step_linf_triton if torch.compiler.is_compiling() else _triton
    return run(x_adv, grad, x0, step_size, eps, lo, hi)


def _call_native(x_adv: Tensor, grad: Tensor, x0: Tensor, step_size: float, eps: float, lo: float, hi: float) -> Tensor:
    return torch.ops.fastdynat.pgd_step_linf(x_adv, grad, x0, step_size, eps, lo, hi)


IMPLEMENTATIONS = {"triton": _call_triton, "cuda": _call_native, "cpp": _call_native, "eager": _eager}


def pgd_step_linf(
    x_adv: Tensor,
    grad: Tensor,
    x0: Tensor,
    *,
    step_size: float,
    eps: float,
    lo: float = 0.0,
    hi: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Return clamp(clamp(x_adv + step_size * sign(grad), x0 - eps, x0 + eps), lo, hi), out of place and detached.

    Bitwise the same in every backend. sign(0) = 0; where `grad` is NaN the pixel does not move. NaN in `x_adv` or
    `x0` gives NaN. A negative `step_size` descends.

    Args:
        x_adv: the current point, any shape, float32 or float64, usually (N, C, H, W) in [lo, hi]. Its memory layout
            is the result's; grad and x0 are copied only where they are laid out differently.
        grad: gradient at `x_adv`, same shape, float32, float64, bfloat16 or float16.
        x0: the clean images, shape and dtype of `x_adv`.
        step_size: move per pixel, in units of the pixel range.
        eps: L-inf radius around `x0`, >= 0, in the same unit.
        lo, hi: the pixel range, lo <= hi.
        backend: "auto" or one of `fastdynat.ops.BACKENDS`.

    Raises:
        ValueError: shapes, dtypes, devices or bounds do not fit; UserError for an unknown backend.
        RuntimeError: the backend asked for cannot run here.
    """
    _check(x_adv, grad, x0, eps, lo, hi)
    run = select("pgd_step_linf", IMPLEMENTATIONS, backend, x_adv.device.type)
    x_adv, grad, x0 = _same_layout(x_adv.detach(), grad.detach(), x0.detach())
    return run(x_adv, grad, x0, float(step_size), float(eps), float(lo), float(hi))


def _check(x_adv: Tensor, grad: Tensor, x0: Tensor, eps: float, lo: float, hi: float) -> None:
    for name, tensor in (("grad", grad), ("x0", x0)):
        if tensor.shape != x_adv.shape:
            got = f"{tuple(tensor.shape)} but x_adv has shape {tuple(x_adv.shape)}"
            raise ValueError(f"pgd_step_linf: {name} has shape {got}")
        if tensor.device != x_adv.device:
            raise ValueError(f"pgd_step_linf: {name} is on {tensor.device} but x_adv is on {x_adv.device}")
    if x_adv.dtype not in IMAGE_DTYPES:
        raise ValueError(f"pgd_step_linf: x_adv must be float32 or float64, got {x_adv.dtype}")
    if x0.dtype != x_adv.dtype:
        raise ValueError(f"pgd_step_linf: x0 is {x0.dtype} but x_adv is {x_adv.dtype}")
    if grad.dtype not in GRAD_DTYPES:
        raise ValueError(f"pgd_step_linf: grad must be float32, float64, bfloat16 or float16, got {grad.dtype}")
    if not eps >= 0:
        raise ValueError(f"pgd_step_linf: eps must be >= 0 (in units of the pixel range), got {eps}")
    if not lo <= hi:
        raise ValueError(f"pgd_step_linf: lo must not exceed hi, got lo={lo} and hi={hi}")


def _same_layout(x_adv: Tensor, grad: Tensor, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three, dense and in one memory order: that of `x_adv`. Copies nothing where they are so already."""
    formats = (torch.contiguous_format, torch.channels_last) if x_adv.dim() == 4 else (torch.contiguous_format,)
    for memory_format in formats:
        if all(t.is_contiguous(memory_format=memory_format) for t in (x_adv, grad, x0)):
            return x_adv, grad, x0
    # empty_like keeps the order of dimensions and closes gaps, so equal strides mean that the tensor is dense.
    template = torch.empty_like(x_adv)
    same = [
        t if t.stride() == template.stride() else torch.empty_like(template, dtype=t.dtype).copy_(t) for t in (x_adv, grad, x0)
    ]
    return same[0], same[1], same[2]
