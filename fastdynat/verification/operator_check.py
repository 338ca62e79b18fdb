"""Checks: a computation, its interchangeable implementations, and the cases on which they must agree."""

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
    """One call on which candidates are compared with the reference.

    Attributes:
        name: dtypes, shape and peculiarities, for messages and tables.
        make: returns the arguments on a device, the same at every call: it uses a generator of its own and
            states every dtype.
        scale: factor of the absolute tolerances, for values larger than 1.
        gpu_only: skipped on the CPU, where it takes too long.
        deep: needs a further specialisation of a kernel. A first use leaves it out for candidates that
            compile each specialisation (`OperatorCheck.compiling`); ``fastdynat doctor --check`` includes it.
    """

    name: str
    make: Callable[[torch.device], tuple[Any, ...]]
    scale: float = 1.0
    gpu_only: bool = False
    deep: bool = False


@dataclass(frozen=True)
class Timing:
    """The call that tables time, of a realistic size.

    Attributes:
        bytes: read and written by one ideal pass over memory.
    """

    name: str
    make: Callable[[torch.device], tuple[Any, ...]]
    bytes: int


def _always(candidate: str, device: torch.device) -> str | None:
    return None


@dataclass(frozen=True)
class OperatorCheck:
    """A computation with several implementations, of which only correct ones are used.

    Attributes:
        name: of the computation, for messages.
        candidates: implementations by name, the preferred one first; each takes a case's arguments and
            depends on nothing else: no random numbers of torch, no writes to the arguments.
        reference: the implementation that is correct by definition.
        cases: returns the cases; called at the first check only.
        tolerance: (relative, absolute) by the dtype of an output; other dtypes are compared bit for bit. NaN
            and infinities must be where the reference has them.
        why_not: returns the reason why a candidate cannot run on a device, or None.
        sources: files that the verdicts depend on; a change of one invalidates them.
        within: returns a context for all calls of the check, such as one that turns TF32 off.
        timed: returns the call that tables time; None: not timed.
        compiling: the candidates that compile each specialisation of a kernel at its first call. Where
            another candidate is right, a first use does not check them (`SPARED`).
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
    """The result of checking a candidate.

    Attributes:
        right: the candidate is correct and may be used.
        case: the first case in which it was wrong; empty if it is right.
        detail: the deviation in that case.
    """

    right: bool
    case: str = ""
    detail: str = ""


RIGHT = CandidateVerdict(True)
# In memory only: of a candidate that compiles and was not checked, because another one is right.
SPARED = CandidateVerdict(False, detail="not checked: compiling its kernels takes long")
_registry: dict[str, OperatorCheck] = {}


def register_check(check: OperatorCheck) -> OperatorCheck:
    """Register `check` for `prepare_checks` and ``fastdynat doctor --check``, replacing one of the same
    name."""
    if REFERENCE in check.candidates:
        raise ValueError(f"{check.name}: {REFERENCE!r} is the reference and cannot be a candidate")
    _registry[check.name] = check
    return check


def registered() -> dict[str, OperatorCheck]:
    """The checks by name, in the order of their registration."""
    return dict(_registry)
