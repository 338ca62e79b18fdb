"""Cases of `project_on_hyperplane`: near, far and unreachable planes, degenerate ones, dtypes and layouts."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdynat.ops.checks.case_helpers import (
    FLOATS,
    WIDE,
    Layout,
    named,
    normal,
    register_cases,
    shaped,
    uniform,
)
from fastdynat.ops.checks.step_cases import LAYOUTS, ODD, PACKED
from fastdynat.ops.project_on_hyperplane import project_on_hyperplane
from fastdynat.verification import Case, Timing

LARGE = (256, 3, 32, 32)


def hyperplane_arguments(
    device: torch.device,
    *,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    w_dtype: torch.dtype,
    layouts: tuple[Layout, Layout],
    far: float,
    norm: str,
) -> tuple[Any, ...]:
    """(x, w, value, at, norm); w has zeros, and the last plane is degenerate (w = 0).

    far: distance of the planes, as a fraction of the farthest that the box reaches.
    """
    x = (1.4 * uniform(shape, 1) - 0.2).clamp(0, 1)
    w = normal(shape, 2) * uniform(shape, 3) ** 4
    w = torch.where(uniform(shape, 4) < 0.1, 0.0, w).to(w_dtype).double()
    at = (x + 0.03 * normal(shape, 5)).clamp(0, 1)
    rows = (shape[0], math.prod(shape[1:]))
    side = torch.where(uniform(shape[:1], 6) < 0.5, -1.0, 1.0).double()
    value = (w * (at - x)).reshape(rows).sum(1) + far * w.abs().reshape(rows).sum(1) * side
    if shape[0] > 2:
        w[-1] = 0
    first, second = layouts
    return (
        first(x.to(device, dtype)),
        second(w.to(device, w_dtype)),
        value.to(device, dtype),
        first(at.to(device, dtype)),
        norm,
    )


def run_projection(x: Tensor, w: Tensor, value: Tensor, at: Tensor, norm: str, backend: str) -> Tensor:
    """`project_on_hyperplane` in one implementation."""
    return project_on_hyperplane(x, w, value, at, norm=norm, backend=backend)


def hyperplane_cases() -> list[Case]:
    """The cases of `project_on_hyperplane`."""
    calls: list[tuple[tuple[int, ...], torch.dtype, torch.dtype, str, float]] = []
    calls += [(ODD, dtype, w, "contiguous", 0.1) for dtype in WIDE for w in FLOATS]
    calls += [(PACKED, torch.float32, torch.float32, layout, 0.1) for layout in LAYOUTS]
    calls += [(ODD, torch.float32, torch.float32, "contiguous", far) for far in (0.001, 0.45, 2.0)]
    shapes = [(0, 3, 8, 8), (3,), (4, 17), (1, 12291)]
    calls += [(shape, torch.float32, torch.float32, "contiguous", 0.1) for shape in shapes]
    calls = list(dict.fromkeys(calls))
    # The code that handles layouts and conversions does not depend on the norm.
    under_l2 = [
        call
        for call in calls
        if call[3] == "contiguous" and (call[1] == call[2] or call[2] == torch.bfloat16)
    ]
    # At first use: both norms, half-precision gradients, float64, and an image too large for registers.
    mixed = {(torch.float32, torch.float64), (torch.float32, torch.float16)}
    mixed |= {(torch.float64, w) for w in FLOATS if w != torch.float64}
    cases = []
    for norm, (shape, dtype, w, layout, far) in [
        *(("linf", call) for call in calls),
        *(("l2", call) for call in under_l2),
    ]:
        name = f"{norm}, {named(dtype)}, w {named(w)}, {shaped(shape)}"
        name += f", {layout}" * (layout != "contiguous") + f", {far:g} of the reach" * (far != 0.1)
        options: Any = {"shape": shape, "dtype": dtype, "w_dtype": w, "far": far, "norm": norm}
        deep = (dtype, w) in mixed or shape in ((3,), (4, 17)) or layout == "unaligned"
        deep |= norm == "l2" and (dtype == torch.float64 or w == torch.bfloat16)
        cases.append(Case(name, partial(hyperplane_arguments, layouts=LAYOUTS[layout], **options), deep=deep))
    return cases


def hyperplane_timing() -> Timing:
    """The timed call of `project_on_hyperplane`."""
    options: Any = {
        "shape": LARGE,
        "dtype": torch.float32,
        "w_dtype": torch.float32,
        "far": 0.1,
        "norm": "linf",
    }
    return Timing(
        f"linf, float32 {shaped(LARGE)}",
        partial(hyperplane_arguments, layouts=LAYOUTS["contiguous"], **options),
        16 * math.prod(LARGE),
    )


# Newton's method in the dtype of the images: the rounding error of the plane's value over the slope.
register_cases(
    "project_on_hyperplane",
    run_projection,
    hyperplane_cases,
    {torch.float32: (0, 4e-6), torch.float64: (0, 2e-12)},
    timed=hyperplane_timing,
)
