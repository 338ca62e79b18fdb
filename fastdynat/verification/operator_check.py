"""`OperatorCheck`: one computation, its interchangeable implementations, and the cases on which they must agree."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

REFERENCE = "eager"  # the name of the reference among candidates
Outputs = Any  # a tensor, None, or a tuple of these


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        name: as messages and tables name it: dtypes, shape, what is odd about it.
        make: the arguments on a device, the same ones at every call. Draws from a generator of its own,
            states every dtype.
        scale: factor of the absolute tolerances, where values are larger than 1.
        gpu_only: skipped on the CPU, where it takes too long.
        deep: one more specialisation of a kernel whose others are in the table. At first use, candidates that compile each of
            them (`OperatorCheck.compiling`) are spared it; a deep check, ``fastdynat doctor --check``, is not.
    """

    name: str
    make: Callable[[torch.device], tuple[Any, ...]]
    scale: float = 1.0
    gpu_only: bool = False
    deep: bool = False


@dataclass(frozen=True)
class Timing:
    """A call of the size that matters, for tables. `bytes`: read and written by one ideal pass over
    memory.
    """

    name: str
    make: Callable[[torch.device], tuple[Any, ...]]
    bytes: int


def _always(candidate: str, device: torch.device) -> str | None:
    return None


@dataclass(frozen=True)
class OperatorCheck:
    """A computation with several implementations, of which only the right ones may run.

    Attributes:
        name: of the computation, as messages name it.
        candidates: implementations by name, the preferred one first; each takes a case's arguments. They must
            be functions of these alone: no random numbers of torch, nothing written to the arguments.
        reference: the implementation that is right by definition.
        cases: makes the table of calls; called at the first check only.
        tolerance: (relative, absolute) by the dtype of an output; a dtype that is missing must be equal bit
            by bit. NaN and infinities must be where the reference has them.
        why_not: why a candidate cannot run on a device at all, or None.
        sources: files that the verdict depends on: where one of them changes, everything is checked again.
        within: made once for each check, entered around all calls; say, a context that turns TF32 off.
        timed: the call that tables time; None: not timed.
        compiling: the candidates that compile a kernel anew for each specialisation, at its first call.
    """

    name: str
    candidates: Mapping[str, Callable[..., Outputs]]
    reference: Callable[..., Outputs]
    cases: Callable[[], Sequence[Case]]
    tolerance: Mapping[torch.dtype, tuple[float, float]]
    why_not: Callable[[str, torch.device], str | None] = _always
    sources: tuple[Path, ...] = ()
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    timed: Callable[[], Timing] | None = None
    compiling: frozenset[str] = frozenset()


@dataclass(frozen=True)
class CandidateVerdict:
    """What became of a candidate.

    Attributes:
        right: it may be used.
        case: the name of the first case in which it was not right; empty where it is.
        detail: what was wrong there.
    """

    right: bool
    case: str = ""
    detail: str = ""


RIGHT = CandidateVerdict(True)
_registry: dict[str, OperatorCheck] = {}


def register_check(check: OperatorCheck) -> OperatorCheck:
    """Make `check` known to `prepare_checks` and to ``fastdynat doctor --check``; a later one of the same name takes
    its place.
    """
    if REFERENCE in check.candidates:
        raise ValueError(f"{check.name}: {REFERENCE!r} is the reference and cannot be a candidate")
    _registry[check.name] = check
    return check


def registered() -> dict[str, OperatorCheck]:
    """The checks by name, in the order of their registration."""
    return dict(_registry)
