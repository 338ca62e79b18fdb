"""Cases of the input gradient of a convolution of images: strides, paddings, odd sizes, layouts."""

from functools import partial

import torch
from torch import Tensor

from fastdynat.ops._select import select
from fastdynat.ops.checks.case_helpers import IMAGE_LAYOUTS, normal, register_cases, shaped
from fastdynat.ops.image_conv_grad import IMPLEMENTATIONS, NAME, Geometry
from fastdynat.verification import Case, Timing

Size = tuple[
    int, int, int, int, int, int, int
]  # images, channels, filters, height, width; taps down and across
SIZES: list[tuple[Size, Geometry]] = [
    ((2, 3, 32, 16, 16, 3, 3), (2, 2, 1, 1)),
    ((3, 3, 24, 9, 7, 3, 3), (1, 1, 1, 1)),
    ((1, 1, 33, 11, 5, 5, 4), (1, 3, 2, 0)),
    ((2, 4, 130, 8, 8, 4, 4), (4, 4, 0, 0)),
    ((1, 3, 7, 5, 5, 6, 7), (2, 1, 3, 4)),
    ((1, 1, 1, 1, 1, 1, 1), (1, 1, 0, 0)),
    ((0, 3, 4, 8, 8, 3, 3), (1, 1, 1, 1)),
]
LARGE: tuple[Size, Geometry] = ((128, 3, 32, 32, 32, 3, 3), (2, 2, 1, 1))


def arguments(
    device: torch.device, *, size: Size, geometry: Geometry, layout: str, gated: bool
) -> tuple[Tensor, Tensor, Tensor | None, tuple[int, int], Geometry]:
    """(grad, weight, gate, size, geometry), with gradients around 1."""
    n, c, k, height, width, rows, columns = size
    down = (height + 2 * geometry[2] - rows) // geometry[0] + 1
    across = (width + 2 * geometry[3] - columns) // geometry[1] + 1
    grad, gate = (
        IMAGE_LAYOUTS[layout](normal((n, k, down, across), seed).to(device, torch.float32)) for seed in (1, 2)
    )
    weight = normal((k, c, rows, columns), 3) / (rows * columns * k) ** 0.5
    return grad, weight.to(device, torch.float32), gate if gated else None, (height, width), geometry


def run(
    grad: Tensor, weight: Tensor, gate: Tensor | None, size: tuple[int, int], geometry: Geometry, backend: str
) -> tuple[Tensor, ...]:
    """The gradient in one implementation."""
    return (select(NAME, IMPLEMENTATIONS, backend, grad)(grad, weight, gate, *size, *geometry),)


def cases() -> list[Case]:
    """The cases of `image_conv_grad`."""
    calls = [(size, geometry, "channels-last", gated) for size, geometry in SIZES for gated in (False, True)]
    calls += [((2, 3, 32, 7, 10, 3, 3), (2, 2, 1, 1), layout, True) for layout in IMAGE_LAYOUTS]
    return [
        Case(
            f"{shaped(size)}, {layout}" + ", gate" * gated,
            partial(arguments, size=size, geometry=geometry, layout=layout, gated=gated),
        )
        for size, geometry, layout, gated in calls
    ]


def timing() -> Timing:
    """The timed call of `image_conv_grad`."""
    size, geometry = LARGE
    n, c, k, height, width, *_ = size
    make = partial(arguments, size=size, geometry=geometry, layout="channels-last", gated=True)
    return Timing(shaped(size), make, 4 * n * height * width * (c + k // 2))


# Sums of up to 130 * 49 products, of magnitude 1 together.
register_cases(NAME, run, cases, {torch.float32: (0, 1e-5)}, timed=timing, candidates=["cpp"])
