"""Cases of the Winograd convolution and filter transform: partial tiles, odd channel counts, layouts."""

import math
from functools import partial

import torch
from torch import Tensor

from fastdynat.ops.checks.case_helpers import IMAGE_LAYOUTS, normal, register_cases, shaped
from fastdynat.ops.winograd import winograd_conv3x3, winograd_weights
from fastdynat.verification import Case, Timing

Size = tuple[int, int, int, int, int]  # images, channels in and out, height, width
NEAR_ZERO = 1e-3
LARGE: Size = (32, 128, 128, 16, 16)


def convolution_arguments(
    device: torch.device, *, size: Size, layout: str, biased: bool, relu: bool = False, added: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, bool]:
    """(x, forward, backward, bias, residual, relu); outputs around 1, filters of the eager form."""
    n, c, k, height, width = size
    x, weight = normal((n, c, height, width), 1), normal((k, c, 3, 3), 2) / (3 * max(c, 1) ** 0.5)
    filters = winograd_weights(weight.to(device, torch.float32), backend="eager")
    bias = normal((k,), 3).to(device, torch.float32) if biased else None
    residual = None
    if added:
        residual = IMAGE_LAYOUTS[layout](normal((n, k, height, width), 4).to(device, torch.float32))
    return IMAGE_LAYOUTS[layout](x.to(device, torch.float32)), *filters, bias, residual, relu


def run_convolution(
    x: Tensor,
    forward: Tensor,
    backward: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The convolution and its input gradient.

    Rounding decides the mask of a ReLU where its argument is near 0: nothing flows back from there.
    """
    x = x.detach().requires_grad_()
    y = winograd_conv3x3(x, forward, backward, bias, residual=residual, relu=relu, backend=backend)
    upstream = torch.ones_like(y)
    if relu:
        argument = winograd_conv3x3(x.detach(), forward, backward, bias, backend="eager")
        argument = argument if residual is None else argument + residual
        upstream = (argument.abs() > NEAR_ZERO).to(y.dtype)
    (grad,) = torch.autograd.grad(y, x, upstream)
    return y.detach(), grad


def convolution_cases() -> list[Case]:
    """The cases of `winograd_conv3x3`."""
    sizes: list[Size] = [
        (2, 3, 5, 9, 7),
        (1, 16, 16, 8, 8),
        (3, 17, 33, 5, 13),
        (2, 64, 65, 4, 6),
        (1, 1, 1, 1, 1),
        (0, 4, 4, 8, 8),
    ]
    calls = [(size, "contiguous", biased) for size in sizes for biased in (False, True)]
    calls += [((2, 16, 8, 7, 10), layout, True) for layout in IMAGE_LAYOUTS]
    found = [
        Case(
            f"{shaped(size)}, {layout}" + ", bias" * biased,
            partial(convolution_arguments, size=size, layout=layout, biased=biased),
        )
        for size, layout, biased in calls
    ]
    return found + [
        Case(
            f"{shaped(size)}, {layout}, bias, ReLU" + ", residual" * added,
            partial(convolution_arguments, size=size, layout=layout, biased=True, relu=True, added=added),
        )
        for size, layout in [(size, "channels-last") for size in sizes] + [((2, 16, 8, 7, 10), "with gaps")]
        for added in (False, True)
    ]


def filter_arguments(device: torch.device, *, shape: tuple[int, int], layout: str) -> tuple[Tensor]:
    """(weight,), (K, C, 3, 3)."""
    return (IMAGE_LAYOUTS[layout](normal((*shape, 3, 3), 4).to(device, torch.float32)),)


def run_transform(weight: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """`winograd_weights` in one implementation."""
    return winograd_weights(weight, backend=backend)


def transform_cases() -> list[Case]:
    """The cases of `winograd_weights`."""
    calls = [(shape, "contiguous") for shape in ((1, 1), (5, 3), (17, 33), (64, 16))] + [
        ((7, 9), name) for name in IMAGE_LAYOUTS
    ]
    return [
        Case(
            f"{shape[0]} filters of {shape[1]} channels, {layout}",
            partial(filter_arguments, shape=shape, layout=layout),
        )
        for shape, layout in calls
    ]


def convolution_timing() -> Timing:
    """The timed call of `winograd_conv3x3`."""
    n, c, k, height, width = LARGE
    make = partial(convolution_arguments, size=LARGE, layout="channels-last", biased=True)
    return Timing(f"forward and backward, {shaped(LARGE)}", make, 8 * n * (c + k) * height * width)


def transform_timing() -> Timing:
    """The timed call of `winograd_weights`."""
    make = partial(filter_arguments, shape=(256, 256), layout="contiguous")
    return Timing("256 filters of 256 channels", make, 4 * (9 + 72) * math.prod((256, 256)))


# Both forms round the transforms, whose matrices multiply by up to 19 in one dimension; gradients sum nine
# filters of ones.
register_cases(
    "winograd_conv3x3",
    run_convolution,
    convolution_cases,
    {torch.float32: (0, 4e-5)},
    timed=convolution_timing,
    candidates=["cpp"],
)
# Computed in float64 and rounded once, so that the neighbouring number is the most.
register_cases(
    "winograd_weights",
    run_transform,
    transform_cases,
    {torch.float32: (2.0**-23, 0)},
    timed=transform_timing,
    candidates=["cpp"],
)
