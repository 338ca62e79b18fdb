"""Shared parts of the case tables: registration, reproducible arguments, unusual memory layouts."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdynat import verification as verified
from fastdynat.ops import _extension, _select
from fastdynat.verification import Case, Timing

Layout = Callable[[Tensor], Tensor]
PACKAGE = Path(__file__).parents[2]
WIDE = (torch.float32, torch.float64)
FLOATS = (*WIDE, torch.bfloat16, torch.float16)


def register(
    name: str,
    run: Callable[..., Any],
    cases: Callable[[], Sequence[Case]],
    tolerance: Mapping[torch.dtype, tuple[float, float]],
    *,
    timed: Callable[[], Timing],
    candidates: Sequence[str] = ("cuda", "triton", "cpp"),
) -> verified.Check:
    """The check of operator `name`: ``run(*args, backend=NAME)`` against backend "eager".

    tolerance: where implementations round the same sums in another order, each is within half of it of the
    exact value.
    """
    module = {"winograd_conv3x3": "winograd", "winograd_weights": "winograd"}.get(name, name)
    sources = [
        PACKAGE / "ops" / f"{module}.py",
        PACKAGE / "kernels" / f"{module}.py",
        *Path(__file__).parent.glob("*.py"),
    ]
    return verified.register(
        verified.Check(
            name=name,
            candidates={candidate: partial(run, backend=candidate) for candidate in candidates},
            reference=partial(run, backend=verified.REFERENCE),
            cases=cases,
            tolerance=tolerance,
            why_not=why_not,
            sources=(*sources, *_extension.files()),
            timed=timed,
            compiling=frozenset({"triton"}),
        )
    )


def why_not(candidate: str, device: torch.device) -> str | None:
    """Why `candidate` is not checked on `device`."""
    reason = _select.why_not(candidate, device.type)
    if reason is None and not _select.is_native(candidate, device.type):
        return "interpreted or simulated, which is for debugging"
    return reason


def at_full_size(timing: Timing, scale: float = 1.0) -> Case:
    """The timed call as a case on GPUs: some faults, of grids and index types, show at the sizes of training
    only.
    """
    return Case(timing.name, timing.make, scale, gpu_only=True)


def generator(seed: int) -> torch.Generator:
    """Of the CPU whatever the device is, so that a case is the same everywhere."""
    return torch.Generator("cpu").manual_seed(seed)


def uniform(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers in [0, 1), the same at every call."""
    return torch.rand(tuple(shape), generator=generator(seed), dtype=torch.float64, device="cpu").to(dtype)


def normal(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers, the same at every call."""
    return torch.randn(tuple(shape), generator=generator(seed), dtype=torch.float64, device="cpu").to(dtype)


def contiguous(t: Tensor) -> Tensor:
    """In the order of the dimensions."""
    return t.contiguous()


def channels_last(t: Tensor) -> Tensor:
    """With the channels next to each other, for four dimensions."""
    return t.contiguous(memory_format=torch.channels_last)


def with_gaps(t: Tensor) -> Tensor:
    """Every second element of memory."""
    return torch.stack([t, t], -1)[..., 1]


def turned(t: Tensor) -> Tensor:
    """Dense, with its last two dimensions the other way in memory."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def unaligned(t: Tensor) -> Tensor:
    """Contiguous, one element after the address that vectors want."""
    return torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape)


def named(dtype: torch.dtype) -> str:
    """`dtype` as names of cases have it."""
    return str(dtype).removeprefix("torch.")


def shaped(shape: Sequence[int]) -> str:
    """`shape` as names of cases have it."""
    return "x".join(map(str, shape))
