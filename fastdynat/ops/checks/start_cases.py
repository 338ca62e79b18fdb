"""Cases of `random_start`: every kind bit for bit, "l2" up to the rounding of the direction's length."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdynat.ops.checks.case_helpers import (
    WIDE,
    Layout,
    at_full_size,
    channels_last,
    contiguous,
    named,
    register_cases,
    shaped,
    turned,
    uniform,
    with_gaps,
)
from fastdynat.ops.random_start import KINDS, random_start
from fastdynat.verification import Case, Timing

SCALE = 8 / 255
STATE = (0x0123456789ABCDEF, 0x7EDCBA9876543210)  # every bit of key and counter in use
IMAGES = (2**32 - 1, 5, 2**31)  # every bit of a number in use
LARGE = (256, 3, 32, 32)


def start_arguments(
    device: torch.device,
    *,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    kind: str,
    layout: Layout,
    numbered: bool = False,
    held: bool = False,
) -> tuple[Tensor, Tensor, str, Tensor | None, Tensor | None]:
    """(x, state, kind, images, the scale on the device)."""
    x = layout(uniform(shape, 1).to(device, dtype))
    images = torch.tensor(IMAGES[: shape[0]], dtype=torch.int64, device=device) if numbered else None
    scale = torch.tensor(SCALE, dtype=torch.float64, device=device) if held else None
    return x, torch.tensor(STATE, dtype=torch.int64, device=device), kind, images, scale


def run_start(
    x: Tensor, state: Tensor, kind: str, images: Tensor | None, scale: Tensor | None, backend: str
) -> Tensor:
    """`random_start` in one implementation."""
    size = SCALE if scale is None else scale
    return random_start(x, state, kind=kind, scale=size, images=images, backend=backend)


def start_cases() -> list[Case]:
    """The cases of `random_start`."""
    layouts = {
        "contiguous": contiguous,
        "channels-last": channels_last,
        "with gaps": with_gaps,
        "turned": turned,
    }
    calls: list[tuple[tuple[int, ...], torch.dtype, str, str]] = []
    for kind in KINDS:
        calls += [((3, 3, 5, 7), dtype, kind, "contiguous") for dtype in WIDE]
        calls += [((2, 3, 8, 8), torch.float32, kind, layout) for layout in layouts]
        calls += [(shape, torch.float32, kind, "contiguous") for shape in ((0, 3, 4, 4), (5,), (1, 1030))]
    # At first use: every kind in both layouts of training; of one kind the other sizes and float64.
    deep = [call for call in calls if call[0] == (5,) or (call[0] == (3, 3, 5, 7) and call[2] != "uniform")]
    deep += [((1, 1030), torch.float32, "gaussian", "contiguous")]
    cases = []
    for shape, dtype, kind, layout in calls:
        name = f"{kind}, {named(dtype)}, {shaped(shape)}" + f", {layout}" * (layout != "contiguous")
        make = partial(start_arguments, shape=shape, dtype=dtype, kind=kind, layout=layouts[layout])
        spared = (shape, dtype, kind, layout) in deep
        cases.append(Case(name, make, scale=float(kind == "l2"), deep=spared))
    for what, given in (("numbered images", "numbered"), ("scale on the device", "held")):
        for kind in KINDS:  # one kind at first use: all take these alike
            options: Any = {"dtype": torch.float32, "layout": contiguous, given: True}
            make = partial(start_arguments, shape=(3, 3, 5, 7), kind=kind, **options)
            name = f"{kind}, float32, 3x3x5x7, {what}"
            cases.append(Case(name, make, scale=float(kind == "l2"), deep=kind != "uniform"))
    return [*cases, at_full_size(start_timing(), scale=0.0)]


def start_timing() -> Timing:
    """The timed call of `random_start`."""
    make: Any = partial(start_arguments, shape=LARGE, dtype=torch.float32, kind="uniform", layout=contiguous)
    return Timing(f"uniform, float32 {shaped(LARGE)}", make, 2 * 4 * math.prod(LARGE))


# A relative 1e-6 of the move, and in float32 the rounding of the pixel.
TOLERANCE = {torch.float32: (0, 1e-6 * SCALE + 2.0**-24), torch.float64: (0, 1e-6 * SCALE)}
register_cases("random_start", run_start, start_cases, TOLERANCE, timed=start_timing)
