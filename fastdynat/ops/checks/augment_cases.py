"""Cases of `augment`, bit for bit: every dtype and layout, with and without crops and flips, strides."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdynat.ops.augment import DTYPES, augment
from fastdynat.ops.checks.case_helpers import at_full_size, generator, named, register_cases, shaped
from fastdynat.verification import Case, Timing

LARGE = (256, 3, 32, 32)


def augment_arguments(
    device: torch.device,
    *,
    size: tuple[int, ...],
    pad: int,
    crop: bool,
    flip: bool,
    strided: bool,
    dtype: torch.dtype,
    last: bool,
) -> tuple[Any, ...]:
    """(images, indices, shifts, flips, pad, dtype, channels_last).

    size: (stored images, batch, channels, height, width).
    """
    g = generator(5)
    count, n, *image = size
    images = torch.randint(256, (count, *image), generator=g, dtype=torch.uint8, device="cpu").to(device)
    many = 2 * n if strided else n
    indices = torch.randint(max(count, 1), (many,), generator=g, dtype=torch.int64, device="cpu").to(device)
    shifts = torch.randint(2 * pad + 1, (2, many), generator=g, dtype=torch.int64, device="cpu").to(device)
    flips = torch.randint(2, (many,), generator=g, dtype=torch.int64, device="cpu").bool().to(device)
    step = slice(None, None, 2) if strided else slice(None)
    return (
        images,
        indices[step],
        shifts[:, step] if crop else None,
        flips[step] if flip else None,
        pad,
        dtype,
        last,
    )


def run_augment(
    images: Tensor,
    indices: Tensor,
    shifts: Tensor | None,
    flips: Tensor | None,
    pad: int,
    dtype: torch.dtype,
    last: bool,
    backend: str,
) -> Tensor:
    """`augment` in one implementation."""
    return augment(images, indices, shifts, flips, pad=pad, dtype=dtype, channels_last=last, backend=backend)


def augment_cases() -> list[Case]:
    """The cases of `augment`."""
    plain = {"pad": 4, "crop": True, "flip": True, "strided": False, "dtype": torch.float32, "last": False}
    calls: list[tuple[str, dict[str, Any]]] = []
    for dtype in DTYPES:
        calls += [(named(dtype), {"size": (5, 7, 3, 9, 11), "dtype": dtype})]
    calls += [
        ("float32, channels-last", {"size": (5, 7, 3, 8, 8), "last": True}),
        ("bfloat16, channels-last", {"size": (5, 7, 3, 7, 9), "last": True, "dtype": torch.bfloat16}),
        ("float32, no crop", {"size": (3, 4, 1, 7, 9), "crop": False}),
        ("float32, no flip", {"size": (3, 4, 1, 7, 9), "pad": 3, "flip": False}),
        ("float32, neither", {"size": (3, 4, 3, 5, 2), "crop": False, "flip": False}),
        ("float32, slices of a plan", {"size": (5, 6, 3, 6, 6), "pad": 2, "strided": True}),
        ("float32, one pixel", {"size": (2, 3, 4, 1, 1), "pad": 2}),
        ("float32, no images", {"size": (5, 0, 3, 8, 8)}),
    ]
    # At first use Triton compiles what training asks for: the dtypes, the layouts, crop with flip, neither.
    deep = {
        "float64",
        "float32, no crop",
        "float32, no flip",
        "float32, slices of a plan",
        "float32, one pixel",
    }
    cases = [
        Case(
            f"{name}, {shaped(options['size'][1:])}",
            partial(augment_arguments, **{**plain, **options}),
            deep=name in deep,
        )
        for name, options in calls
    ]
    return [*cases, at_full_size(augment_timing())]


def augment_timing() -> Timing:
    """The timed call of `augment`."""
    make = partial(
        augment_arguments,
        size=(1024, *LARGE),
        pad=4,
        crop=True,
        flip=True,
        strided=False,
        dtype=torch.float32,
        last=False,
    )
    return Timing(f"float32 {shaped(LARGE)}", make, 5 * math.prod(LARGE))


register_cases("augment", run_augment, augment_cases, {}, timed=augment_timing)
