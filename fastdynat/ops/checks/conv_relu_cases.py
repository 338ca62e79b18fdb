"""Cases of cuDNN's convolution with bias, residual and ReLU: one check per dtype."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdynat import verification
from fastdynat.execution.float32 import full_float32
from fastdynat.ops import conv_relu as operator
from fastdynat.ops.checks.case_helpers import PACKAGE, Layout, channels_last, contiguous, normal, shaped
from fastdynat.verification import Case, Timing

# (relative, absolute). Results are around 1 and summed in float32; an engine may round them before it adds
# the residual.
TOLERANCES = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (2.0**-6, 0.03), torch.float16: (2.0**-9, 4e-3)}
LAYOUTS: dict[str, Layout] = {"channels-last": channels_last, "contiguous": contiguous}
# images, channels in and out, side, kernel, stride, groups
Size = tuple[int, int, int, int, int, int, int]
SIZES: tuple[Size, ...] = (
    (2, 3, 64, 9, 3, 1, 1),
    (3, 64, 64, 8, 3, 1, 1),
    (2, 64, 128, 8, 3, 2, 1),
    (2, 64, 128, 8, 1, 2, 1),
    (1, 16, 160, 5, 3, 1, 1),
    (2, 32, 32, 7, 3, 1, 4),
)
LARGE: Size = (128, 64, 64, 32, 3, 1, 1)
# With a kernel of one pixel, so that no algorithm can spread a value to its neighbours.
POINTWISE = SIZES[3]
ODD_VALUES = (math.nan, math.inf, -math.inf)


def conv_relu_arguments(
    device: torch.device,
    *,
    size: Size,
    dtype: torch.dtype,
    layout: str,
    summed: bool,
    biased: bool = True,
    odd: tuple[str, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, list[int], list[int], int]:
    """(x, weight, bias, residual, stride, padding, groups), scaled so that results are around 1.

    odd: "x", "bias" or "residual", and the value of its first element.
    """
    n, c, k, side, kernel, stride, groups = size
    lay_out, pad = LAYOUTS[layout], kernel // 2
    out_side = (side + 2 * pad - kernel) // stride + 1
    weight = normal((k, c // groups, kernel, kernel), 2) / (kernel * (c // groups) ** 0.5)
    residual = lay_out(normal((n, k, out_side, out_side), 4).to(device, dtype)) if summed else None
    bias = normal((k,), 3).to(device, dtype) if biased else None
    x = lay_out(normal((n, c, side, side), 1).to(device, dtype))
    if odd is not None:
        changed = {"x": x, "bias": bias, "residual": residual}[odd[0]]
        assert changed is not None
        changed[(0,) * changed.dim()] = odd[1]
    return x, lay_out(weight.to(device, dtype)), bias, residual, [stride] * 2, [pad] * 2, groups


def run_conv_relu(
    forward: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Any,
    residual: Any,
    stride: Any,
    padding: Any,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """The result, and the summed error of the residual's gradient, which is 0 if right."""
    if residual is not None:
        residual = residual.detach().requires_grad_()
    out = forward(x, weight, bias, residual, stride=stride, padding=padding, groups=groups)
    if residual is None:
        return out, torch.zeros((), device=x.device)
    (passed,) = torch.autograd.grad(out, residual, torch.ones_like(out))
    open_units = ~(out.detach() <= 0)  # also those of NaN
    return out.detach(), (passed - open_units.to(passed.dtype)).abs().sum().float()


def defined(
    x: Tensor, weight: Tensor, bias: Any, residual: Any, stride: Any, padding: Any, groups: int
) -> tuple[Tensor, Tensor]:
    """The reference: the definition in float32, rounded once."""
    bias, residual = (None if t is None else t.float() for t in (bias, residual))
    out = operator.reference(x.float(), weight.float(), bias, residual, stride, padding, [1, 1], groups)
    return out.to(x.dtype), torch.zeros((), device=x.device)


def conv_relu_cases(dtype: torch.dtype) -> list[Case]:
    """The cases of `dtype`."""
    calls = [(size, layout, summed) for size in SIZES for layout in LAYOUTS for summed in (False, True)]
    cases = [
        Case(
            f"{shaped(size)}, {layout}" + ", residual" * summed,
            partial(conv_relu_arguments, size=size, dtype=dtype, layout=layout, summed=summed),
        )
        for size, layout, summed in calls
    ]
    bare = partial(
        conv_relu_arguments, size=SIZES[1], dtype=dtype, layout="channels-last", summed=True, biased=False
    )
    return [*cases, Case(f"{shaped(SIZES[1])}, no bias", bare), *_odd_cases(dtype)]


def _odd_cases(dtype: torch.dtype) -> list[Case]:
    """Each operand with one NaN or infinity: cuDNN's ReLU may turn NaN into 0, where all others keep it."""
    make = partial(conv_relu_arguments, size=POINTWISE, dtype=dtype, layout="channels-last")
    calls = [("x", False), ("bias", False), ("x", True), ("bias", True), ("residual", True)]
    return [
        Case(
            f"{shaped(POINTWISE)}{', residual' * summed}, {value} in {name}",
            partial(make, summed=summed, odd=(name, value)),
        )
        for name, summed in calls
        for value in ODD_VALUES
    ]


def conv_relu_timing(dtype: torch.dtype) -> Timing:
    """The timed call for `dtype`."""
    n, c, k, side, *_ = LARGE
    make = partial(conv_relu_arguments, size=LARGE, dtype=dtype, layout="channels-last", summed=True)
    return Timing(f"forward, {shaped(LARGE)}", make, n * (c + 2 * k) * side**2 * dtype.itemsize)


def why_no_cudnn(candidate: str, device: torch.device) -> str | None:
    """The reason why cuDNN is not checked on `device`, or None."""
    if device.type != "cuda":
        return f"needs CUDA tensors, got {device.type}"
    return None if torch.backends.cudnn.is_available() else "this build of torch has no cuDNN"


def conv_relu_check(dtype: torch.dtype) -> verification.OperatorCheck:
    """The check for `dtype`."""
    return verification.OperatorCheck(
        name=operator.conv_relu_check_name(dtype),
        candidates={"cudnn": partial(run_conv_relu, operator.conv_relu)},
        reference=defined,
        cases=partial(conv_relu_cases, dtype),
        tolerance={dtype: TOLERANCES[dtype]},
        why_not=why_no_cudnn,
        sources=(PACKAGE / "ops" / "conv_relu.py", PACKAGE / "ops" / "checks" / "conv_relu_cases.py"),
        within=full_float32,
        timed=partial(conv_relu_timing, dtype),
    )


for _dtype in TOLERANCES:
    verification.register_check(conv_relu_check(_dtype))
