"""Which implementation of an operator runs, and why another one cannot."""

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastdynat import verification
from fastdynat.errors import unknown_name
from fastdynat.ops import _extension
from fastdynat.ops._timed import fastest_of

BACKENDS = ("triton", "cuda", "cpp", "eager")
ENVIRONMENT = "FASTDYNAT_KERNELS"
OPERATORS: list[str] = []  # by name, as they register

# Best first. The Triton interpreter is for debugging, so "auto" never takes it.
_PREFERENCE = {"cuda": ("cuda", "triton", "eager"), "cpu": ("cpp", "eager")}
_HAS_TRITON = importlib.util.find_spec("triton") is not None

_override = "auto"

F = TypeVar("F", bound=Callable[..., Any])


def _known(name: str) -> str:
    """`name`, or UserError where it is no backend."""
    if name != "auto" and name not in BACKENDS:
        raise unknown_name("backend", name, ("auto", *BACKENDS))
    return name


def set_backend(name: str) -> None:
    """Use backend `name` for every operator of this process; "auto" ends the override.

    A call's own `backend=` goes first; this goes before the environment variable FASTDYNAT_KERNELS.
    Raises UserError for an unknown name. Whether it can run is known only when an operator is called.
    """
    global _override
    _override = _known(name)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """`set_backend(name)` for the body of a with statement; "auto" leaves as it is what is in force.

    Holds for the process, not for the thread.
    """
    before = _override
    set_backend(before if name == "auto" else name)
    try:
        yield
    finally:
        set_backend(before)


def interpreting() -> bool:
    """Whether Triton interprets its kernels on the CPU (read by Triton when the kernels are imported)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _why_not_native(name: str) -> str | None:
    """Why the csrc backend `name` is not in this build, or None."""
    if not _extension.LOADED:
        return f"the extension fastdynat._C is not built ({_extension.REBUILD})"
    if name == "cuda" and not _extension.WITH_CUDA:
        return f"fastdynat._C was built without its CUDA half (FASTDYNAT_CUDA=1 {_extension.REBUILD})"
    return None


def why_unavailable(name: str, device_type: str) -> str | None:
    """Why backend `name` cannot take tensors on `device_type` ("cpu", "cuda", ...), or None when it can."""
    if name == "eager":
        return None
    if name == "triton":
        if not _HAS_TRITON:
            return "triton is not installed (pip install triton)"
        if device_type == "cuda" or (device_type == "cpu" and interpreting()):
            return None
        return f"needs CUDA tensors, got {device_type} (TRITON_INTERPRET=1 interprets it on the CPU, slowly)"
    needed = "cpu" if name == "cpp" else "cuda"
    return _why_not_native(name) if device_type == needed else f"needs {needed} tensors, got {device_type}"


def available_backends() -> dict[str, str | None]:
    """Every backend by name: None where it can run on this machine, else the reason why not."""
    has_gpu = torch.cuda.is_available()
    found = {name: why_unavailable(name, "cpu" if name == "cpp" else "cuda") for name in BACKENDS}
    if not has_gpu:
        found["triton"] = found["triton"] or (None if interpreting() else "no CUDA device is visible")
        found["cuda"] = found["cuda"] or "no CUDA device is visible"
    return found


def selected_backend(device_type: str, backend: str = "auto") -> str:
    """The name of the backend that runs for tensors on `device_type`, for a log line.

    Raises UserError for an unknown name and RuntimeError when the backend asked for cannot run.
    """
    asked = _asked(backend)
    if asked == "auto":
        return (*_candidates(BACKENDS, device_type), verification.REFERENCE)[0]
    _check_possible("ops", BACKENDS, asked, device_type)
    return asked


def select(op: str, implementations: Mapping[str, F], backend: str, like: Tensor) -> F:
    """The implementation of `op` to call: `backend`, else the override, else FASTDYNAT_KERNELS, else the best
    that is right.

    A call that names its backend runs it as it is; what the override or the environment insist on is verified
    first.

    implementations: by backend name; "eager" must be there.
    like: the tensor whose device decides.

    Raises: as `selected_backend`; WrongImplementation where the one insisted on is wrong on this machine.
    """
    asked = _asked(backend)
    if asked == "auto":
        names = _usable(op, implementations, like.device)
        if len(names) == 1 or torch.compiler.is_compiling():
            return implementations[names[0]]
        return fastest_of(op, implementations, names, like, capturing=capturing)
    _check_possible(op, implementations, asked, like.device.type)
    if backend == "auto" and is_native(asked, like.device.type):
        _insist(op, asked, like.device)
    return implementations[asked]


def is_native(name: str, device_type: str) -> bool:
    """Whether backend `name` runs on such a device for use, not in an interpreter or a simulation."""
    return name in _PREFERENCE.get(device_type, ()) and name != verification.REFERENCE


def prepare(device: torch.device) -> None:
    """Verify now, on `device`, the implementations of all operators that would be verified at their first
    use.

    For whoever captures CUDA graphs or compiles. Where the override or the environment insist on one, it is
    verified alone.

    Raises WrongImplementation where it is wrong.
    """
    _load_checks()
    device = _with_index(device)
    asked = _asked("auto")
    if asked == "auto":
        verification.prepare_checks(device, OPERATORS)
    elif is_native(asked, device.type) and why_unavailable(asked, device.type) is None:
        for op in OPERATORS:
            verification.insist(op, asked, device)


def operators_in_use(device: torch.device) -> str:
    """`selected_backend` with the operators that it is not right for, as far as is known; for a log line."""
    name = selected_backend(device.type)
    if _asked("auto") != "auto":
        return name
    device = _with_index(device)
    others: dict[str, list[str]] = {}
    for op in OPERATORS:
        found = verification.peek(op, device) or {}
        if found.get(name, verification.RIGHT).right:
            continue
        instead = next((n for n in _candidates(found, device.type) if found[n].right), verification.REFERENCE)
        others.setdefault(instead, []).append(op)
    return ", but ".join([name, *(f"{instead} for {', '.join(ops)}" for instead, ops in others.items())])


def _with_index(device: torch.device) -> torch.device:
    """`device` as tensors on it name it."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _asked(backend: str) -> str:
    asked = _known(backend)
    if asked == "auto":
        asked = _override
    return asked if asked != "auto" else _known(os.environ.get(ENVIRONMENT) or "auto")


def _check_possible(op: str, offered: Collection[str], asked: str, device_type: str) -> None:
    reason = (
        why_unavailable(asked, device_type)
        if asked in offered
        else "this operator has no such implementation"
    )
    if reason is not None:
        raise RuntimeError(f"{op}: backend {asked!r} cannot run: {reason}")


def _candidates(offered: Collection[str], device_type: str) -> list[str]:
    """Those of `offered` that can run, best first, without eager."""
    order = _PREFERENCE.get(device_type, ())
    return [
        n
        for n in order
        if n in offered and n != verification.REFERENCE and why_unavailable(n, device_type) is None
    ]


def _usable(op: str, offered: Collection[str], device: torch.device) -> tuple[str, ...]:
    """The implementations that are right on `device`, the preferred one first; the preferred one alone while
    compiling.
    """
    names = _candidates(offered, device.type)
    if not names or verification.checking():
        return (*names[:1], verification.REFERENCE)[:1]
    if torch.compiler.is_compiling():
        return (_best_known(op, tuple(names), device.type, device.index),)
    found: Mapping[str, verification.CandidateVerdict] | None = verification.peek(op, device)
    if found is None or any(name not in found for name in names):
        if capturing(device):
            return (_best_known(op, tuple(names), device.type, device.index),)
        found = _verdicts(op, device)
    return (*(name for name in names if name not in found or found[name].right), verification.REFERENCE)


@torch.compiler.assume_constant_result
def _best_known(op: str, names: tuple[str, ...], device_type: str, index: int | None) -> str:
    """The best where nothing can be run: the verdict of this process or of an earlier one, and eager where
    there is none.
    """
    device = torch.device(device_type) if index is None else torch.device(device_type, index)
    _load_checks()
    if op not in verification.registered():
        return names[0]
    found = verification.known(op, device) or {}
    return next((name for name in names if name in found and found[name].right), verification.REFERENCE)


def _verdicts(op: str, device: torch.device) -> Mapping[str, verification.CandidateVerdict]:
    """On every candidate that can run on `device`; of an operator without a check none."""
    _load_checks()
    return verification.verdicts(op, device) if op in verification.registered() else {}


def _insist(op: str, name: str, device: torch.device) -> None:
    if verification.checking() or torch.compiler.is_compiling():
        return
    found = verification.peek(op, device)
    if found is None or name not in found:
        if capturing(device):
            return
        _load_checks()
        if op not in verification.registered():
            return
    verification.insist(op, name, device)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _load_checks() -> None:
    """The tables are made when they are needed, which is not where a command only says what there is."""
    importlib.import_module("fastdynat.ops.checks")
