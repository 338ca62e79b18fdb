"""Cases of the PGD steps: odd sizes, dtypes, layouts, zeros, NaN, ties, no images."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdynat.ops.checks.case_helpers import (
    FLOATS,
    WIDE,
    Layout,
    at_full_size,
    channels_last,
    contiguous,
    named,
    normal,
    register_cases,
    shaped,
    turned,
    unaligned,
    uniform,
    with_gaps,
)
from fastdynat.ops.pgd_step_l0 import pgd_step_l0
from fastdynat.ops.pgd_step_l1 import pgd_step_l1
from fastdynat.ops.pgd_step_l2 import attack_step_l2
from fastdynat.ops.pgd_step_linf import attack_step_linf, pgd_step_linf
from fastdynat.verification import Case, Timing

EPS, STEP = 8 / 255, 2 / 255
ODD, PACKED, LARGE = (3, 3, 9, 11), (4, 3, 8, 8), (256, 3, 32, 32)
# shape, dtype of the images and of the gradient, dtype of the copy, layout
Call = tuple[Sequence[int], torch.dtype, torch.dtype, torch.dtype | None, str]
LAYOUTS: dict[str, tuple[Layout, Layout]] = {
    "contiguous": (contiguous, contiguous),
    "channels-last": (channels_last, channels_last),
    "channels-last and contiguous": (channels_last, contiguous),
    "with gaps": (with_gaps, contiguous),
    "turned": (turned, turned),
    "unaligned": (unaligned, unaligned),
}


def step_arguments(
    device: torch.device,
    *,
    shape: Sequence[int],
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    low: torch.dtype | None,
    layouts: tuple[Layout, Layout],
    move: float,
    held: bool = False,
) -> tuple[Any, ...]:
    """(x_adv, grad, x0, low, held) with saturated pixels; `held`: the device holds step size and radius.

    A tenth of the gradient is 0 and a tenth NaN; the first image's gradient is nothing else.
    """
    x0 = (1.4 * uniform(shape, 1) - 0.2).clamp(0, 1)
    x_adv = (x0 + move * normal(shape, 2)).clamp(0, 1)
    grad = 1e-3 * (16 * normal(shape, 3)).round()  # with ties
    odd = uniform(shape, 4)
    grad = torch.where(odd < 0.1, 0.0, torch.where(odd > 0.9, math.nan, grad))
    grad[:1] = torch.where(odd[:1] < 0.5, 0.0, math.nan)
    first, second = layouts
    return (
        first(x_adv.to(device, dtype)),
        second(grad.to(device, grad_dtype)),
        first(x0.to(device, dtype)),
        low,
        held,
    )


def step_cases(
    move: float,
    *,
    lows: bool,
    flat: bool,
    held: bool = True,
    grids: Sequence[Sequence[int]] = (),
    one_kernel: bool = False,
) -> list[Case]:
    """The cases of a step.

    Args:
        move: standard deviation of x_adv - x0.
        lows: the step can return a half-precision copy.
        flat: (N, D) and (N,) tensors are images, too.
        held: the step takes its sizes from the device, too.
        grids: further shapes.
        one_kernel: the step has the same kernel for `grids` as for other shapes.
    """
    same = LAYOUTS["contiguous"]
    calls: list[Call] = []
    calls += [(ODD, dtype, grad, None, "contiguous") for dtype in WIDE for grad in FLOATS]
    calls += [(PACKED, torch.float32, torch.float32, None, layout) for layout in LAYOUTS]
    calls += [(ODD, torch.float32, torch.bfloat16, None, "channels-last")]
    shapes = [(0, 3, 8, 8), (1, 1, 1, 1), *(((2, 1025), (7, 4), (1,)) if flat else ()), *grids]
    calls += [(shape, torch.float32, torch.float32, None, "contiguous") for shape in shapes]
    if lows:
        calls += [(ODD, torch.float32, low, low, "contiguous") for low in (torch.bfloat16, torch.float16)]
        calls += [(PACKED, torch.float32, torch.bfloat16, torch.bfloat16, "channels-last")]
    # At first use: float32 in odd and even sizes, in one part and in several, bfloat16 with and without a
    # copy, float64.
    first: set[Call] = {(ODD, torch.float64, torch.float64, None, "contiguous")}
    plain = [ODD, (0, 3, 8, 8), *(((2, 1025), (7, 4)) if flat else ()), *grids]
    first |= {(shape, torch.float32, torch.float32, None, "contiguous") for shape in plain}
    first |= {
        (PACKED, torch.float32, torch.float32, None, layout) for layout in LAYOUTS if layout != "unaligned"
    }
    first |= {
        (ODD, torch.float32, torch.bfloat16, None, layout) for layout in ("contiguous", "channels-last")
    }
    first |= {(ODD, torch.float32, torch.float16, torch.float16, "contiguous")}
    first |= {(PACKED, torch.float32, torch.bfloat16, torch.bfloat16, "channels-last")}
    cases = []
    for shape, dtype, grad, low, layout in calls:
        name = f"{named(dtype)}, gradient {named(grad)}, {shaped(shape)}"
        name += f", {layout}" * (layout != "contiguous") + (f", copy in {named(low)}" if low else "")
        options: Any = {"shape": shape, "dtype": dtype, "grad_dtype": grad, "low": low, "move": move}
        deep = (shape, dtype, grad, low, layout) not in first
        cases.append(
            Case(name, partial(step_arguments, layouts=LAYOUTS.get(layout, same), **options), deep=deep)
        )
    if held:
        first_held = (ODD, *grids) if one_kernel else (ODD,)
        cases += [
            held_case(shape, dtype, move, deep=dtype != torch.float32 or shape not in first_held)
            for shape in (ODD, *grids)
            for dtype in WIDE
        ]
    return [*cases, at_full_size(step_timing(move))]


def held_case(shape: Sequence[int], dtype: torch.dtype, move: float, *, deep: bool) -> Case:
    """A case with step size and radius on the device."""
    options: Any = {"dtype": dtype, "grad_dtype": dtype, "low": None, "layouts": LAYOUTS["contiguous"]}
    make = partial(step_arguments, shape=shape, move=move, held=True, **options)
    return Case(f"{named(dtype)}, {shaped(shape)}, sizes on the device", make, deep=deep)


def sizes(step_size: float, eps: float, held: bool, like: Tensor) -> dict[str, Any]:
    """The two sizes as numbers, or as scalars on the device of `like`."""
    if not held:
        return {"step_size": step_size, "eps": eps}
    on_device = torch.tensor([step_size, eps], dtype=torch.float64, device=like.device)
    return {"step_size": on_device[0], "eps": on_device[1]}


def step_timing(move: float, *, low: torch.dtype | None = None) -> Timing:
    """The timed call of a step."""
    options: Any = {
        "shape": LARGE,
        "dtype": torch.float32,
        "grad_dtype": torch.float32,
        "low": low,
        "move": move,
    }
    make = partial(step_arguments, layouts=LAYOUTS["contiguous"], **options)
    return Timing(f"float32 {shaped(LARGE)}", make, 4 * 4 * math.prod(LARGE))


def run_linf(
    x_adv: Tensor, grad: Tensor, x0: Tensor, low: torch.dtype | None, held: bool, backend: str
) -> tuple[Any, ...]:
    """`attack_step_linf`, or `pgd_step_linf` for (N, D)."""
    step = sizes(STEP, EPS, held, x_adv) | {"backend": backend}
    if x_adv.dim() == 2:  # without `moved`, which is another kernel
        return (pgd_step_linf(x_adv, grad, x0, **step),)
    return tuple(attack_step_linf(x_adv, grad, x0, low_dtype=low, **step))


def run_l2(
    x_adv: Tensor, grad: Tensor, x0: Tensor, low: torch.dtype | None, held: bool, backend: str
) -> tuple[Any, ...]:
    """`attack_step_l2`."""
    step = sizes(0.3, 0.5, held, x_adv)
    return tuple(attack_step_l2(x_adv, grad, x0, **step, low_dtype=low, backend=backend))


def run_l1(x_adv: Tensor, grad: Tensor, x0: Tensor, low: None, held: bool, backend: str) -> Tensor:
    """`pgd_step_l1`."""
    return pgd_step_l1(x_adv, grad, x0, **sizes(0.7, 1.0, held, x_adv), sparsity=0.8, backend=backend)


def run_l0(x_adv: Tensor, grad: Tensor, x0: Tensor, low: None, held: bool, backend: str) -> Tensor:
    """`pgd_step_l0`."""
    return pgd_step_l0(x_adv, grad, x0, step_size=2.0, pixels=6, backend=backend)


Tolerances = dict[torch.dtype, tuple[float, float]]
HALVES: Tolerances = {
    torch.bfloat16: (2.0**-7, 2e-6),
    torch.float16: (2.0**-10, 2e-6),
}  # the neighbouring number
large: Callable[..., list[Case]] = partial(step_cases, grids=[(1, 3, 65, 67)])

register_cases(
    "pgd_step_linf",
    run_linf,
    partial(large, EPS, lows=True, flat=True, one_kernel=True),
    {},
    timed=partial(step_timing, EPS),
)
# Kernels sum norms in float64, the eager form in the dtype of the images.
L2: Tolerances = {torch.float32: (0, 2e-6), torch.float64: (0, 2e-14), **HALVES}
register_cases(
    "pgd_step_l2", run_l2, partial(large, 0.05, lows=True, flat=True), L2, timed=partial(step_timing, 0.05)
)
# The multiplier is found to the precision of the images.
L1: Tolerances = {torch.float32: (0, 2e-6), torch.float64: (0, 2e-13)}
register_cases(
    "pgd_step_l1", run_l1, partial(large, 0.02, lows=False, flat=True), L1, timed=partial(step_timing, 0.02)
)
# The selection is exact; kept pixels are rounded once or twice.
L0: Tolerances = {torch.float32: (0, 1.2e-7), torch.float64: (0, 1e-15)}
register_cases(
    "pgd_step_l0",
    run_l0,
    partial(large, 0.1, lows=False, flat=False, held=False),
    L0,
    timed=partial(step_timing, 0.1),
)
