"""Comparison of a candidate's outputs with the reference's."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Tolerances = Mapping[torch.dtype, tuple[float, float]]


def difference(got: Any, expected: Any, tolerances: Tolerances, scale: float = 1.0) -> str:
    """Describe how `got` differs from `expected`; empty if it is equal within `tolerances`.

    got, expected: a tensor, None, or a tuple of these.
    tolerances: see `OperatorCheck.tolerance`; `scale` multiplies the absolute ones.
    """
    ours, theirs = _flat(got), _flat(expected)
    if len(ours) != len(theirs):
        return f"{len(ours)} outputs instead of {len(theirs)}"
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if found := _of_one(a, b, tolerances, scale):
            return f"output {number}: {found}" if len(ours) > 1 else found
    return ""


def _flat(outputs: Any) -> list[Any]:
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]


def _of_one(got: Any, expected: Any, tolerances: Tolerances, scale: float) -> str:
    if expected is None or got is None:
        return "" if got is expected else f"{_kind(got)} instead of {_kind(expected)}"
    if not isinstance(got, Tensor):
        return f"{_kind(got)} instead of a tensor"
    for name in ("shape", "dtype", "device"):
        ours, theirs = getattr(got, name), getattr(expected, name)
        if ours != theirs:
            return f"{name} {_short(ours)} instead of {_short(theirs)}"
    if expected.dim() == 4 and _layouts(got) != _layouts(expected):
        return f"strides {got.stride()} instead of {expected.stride()}"
    return _of_values(got.detach(), expected.detach(), *tolerances.get(expected.dtype, (0.0, 0.0)), scale)


def _of_values(got: Tensor, expected: Tensor, relative: float, absolute: float, scale: float) -> str:
    allowed = (relative, absolute * scale)
    if got.dtype.is_floating_point:
        ours, theirs = got.double(), expected.double()
        # Infinities and NaN must be the reference's own; a NaN error is never within the tolerance.
        near = (ours - theirs).abs() <= allowed[1] + allowed[0] * theirs.abs()
        right = (
            (ours == theirs) | (ours.isnan() & theirs.isnan()) | (near & ours.isfinite() & theirs.isfinite())
        )
    else:
        ours, theirs, right = got, expected, got == expected
    if bool(right.all()):
        return ""
    wrong = ~right
    if got.dtype.is_floating_point:
        size = (ours - theirs).abs().nan_to_num(torch.inf, torch.inf).masked_fill(right, -1.0)
    else:
        size = wrong.double()
    place = _place(int(size.reshape(-1).argmax()), got)
    a, b = ours[place].item(), theirs[place].item()
    how_many = f"{int(wrong.sum())} of {wrong.numel()} {_short(got.dtype)} values differ"
    text = f"{how_many}, most at {list(place)}: {a!r}, expected {b!r}"
    if not got.dtype.is_floating_point:
        return text
    return f"{text} (off by {abs(a - b):.3g}, allowed {allowed[1] + allowed[0] * abs(b):.3g})"


def _place(flat: int, like: Tensor) -> tuple[int, ...]:
    return (
        tuple(int(i) for i in torch.unravel_index(torch.tensor(flat, device="cpu"), like.shape))
        if like.dim()
        else ()
    )


def _layouts(t: Tensor) -> tuple[bool, bool]:
    return t.is_contiguous(), t.is_contiguous(memory_format=torch.channels_last)


def _kind(value: Any) -> str:
    return (
        "nothing"
        if value is None
        else "a tensor"
        if isinstance(value, Tensor)
        else f"a {type(value).__name__}"
    )


def _short(value: Any) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value).removeprefix("torch.")
