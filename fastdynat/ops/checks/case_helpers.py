"""Shared parts of the case modules: registration, reproducible arguments, unusual memory layouts."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdynat import verification
from fastdynat.ops import _extension, _select
from fastdynat.verification import Case, Timing

Layout = Callable[[Tensor], Tensor]
PACKAGE = Path(__file__).parents[2]
WIDE = (torch.float32, torch.float64)
FLOATS = (*WIDE, torch.bfloat16, torch.float16)


def register_cases(
    name: str,
    run: Callable[..., Any],
    cases: Callable[[], Sequence[Case]],
    tolerance: Mapping[torch.dtype, tuple[float, float]],
    *,
    timed: Callable[[], Timing],
    candidates: Sequence[str] = ("cuda", "triton", "cpp"),
) -> verification.OperatorCheck:
    """Register the check of operator `name`: ``run(*args, backend=NAME)`` against backend "eager".

    tolerance: (relative, absolute) by dtype; twice an implementation's distance from the exact value.
    """
    module = {"winograd_conv3x3": "winograd", "winograd_weights": "winograd"}.get(name, name)
    folders = (PACKAGE / "ops", PACKAGE / "kernels")
    sources = [folder / f"{module}.py" for folder in folders]
    sources += [shared for folder in folders for shared in sorted(folder.glob("_*.py"))]
    sources += sorted(Path(__file__).parent.glob("*.py"))
    return verification.register_check(
        verification.OperatorCheck(
            name=name,
            candidates={candidate: partial(run, backend=candidate) for candidate in candidates},
            reference=partial(run, backend=verification.REFERENCE),
            cases=cases,
            tolerance=tolerance,
            why_not=why_unchecked,
            sources=(*sources, *_extension.files()),
            timed=timed,
            compiling=frozenset({"triton"}),
        )
    )


def why_unchecked(candidate: str, device: torch.device) -> str | None:
    """The reason why `candidate` is not checked on `device`, or None."""
    reason = _select.why_unavailable(candidate, device.type)
    if reason is None and not _select.is_native(candidate, device.type):
        return "interpreted or simulated, which is for debugging"
    return reason


def at_full_size(timing: Timing, scale: float = 1.0) -> Case:
    """The timed call as a case on GPUs: errors in grids and index types show only at training sizes."""
    return Case(timing.name, timing.make, scale, gpu_only=True)


def generator(seed: int) -> torch.Generator:
    """A seeded generator of the CPU: a case has the same arguments on every device."""
    return torch.Generator("cpu").manual_seed(seed)


def uniform(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Uniform numbers in [0, 1), the same at every call."""
    return torch.rand(tuple(shape), generator=generator(seed), dtype=torch.float64, device="cpu").to(dtype)


def normal(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers, the same at every call."""
    return torch.randn(tuple(shape), generator=generator(seed), dtype=torch.float64, device="cpu").to(dtype)


def contiguous(t: Tensor) -> Tensor:
    """A contiguous copy of `t`."""
    return t.contiguous()


def channels_last(t: Tensor) -> Tensor:
    """A channels-last copy of `t`, which has four dimensions."""
    return t.contiguous(memory_format=torch.channels_last)


def with_gaps(t: Tensor) -> Tensor:
    """A copy of `t` that uses every second element of its memory."""
    return torch.stack([t, t], -1)[..., 1]


def turned(t: Tensor) -> Tensor:
    """A dense copy of `t` with its last two dimensions swapped in memory."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


IMAGE_LAYOUTS: dict[str, Layout] = {
    "contiguous": contiguous,
    "channels-last": channels_last,
    "with gaps": with_gaps,
    "turned": turned,
}


def unaligned(t: Tensor) -> Tensor:
    """A contiguous copy of `t`, one element off the alignment of vector loads."""
    return torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape)


def named(dtype: torch.dtype) -> str:
    """The name of `dtype` in case names: "float32"."""
    return str(dtype).removeprefix("torch.")


def shaped(shape: Sequence[int]) -> str:
    """`shape` in case names: "4x3x8x8"."""
    return "x".join(map(str, shape))
