"""Selection of the implementation that an operator runs, with reasons why others cannot run."""

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
OPERATORS: list[str] = []  # names, in order of registration

# Best first. The Triton interpreter is for debugging, so "auto" never takes it.
_PREFERENCE = {"cuda": ("cuda", "triton", "eager"), "cpu": ("cpp", "eager")}
_HAS_TRITON = importlib.util.find_spec("triton") is not None

_override = "auto"

F = TypeVar("F", bound=Callable[..., Any])


def _known(name: str) -> str:
    """Return `name`; raise UserError unless it is a backend or "auto"."""
    if name != "auto" and name not in BACKENDS:
        raise unknown_name("backend", name, ("auto", *BACKENDS))
    return name


def set_backend(name: str) -> None:
    """Use backend `name` for every operator of this process; "auto" ends the override.

    A call's `backend=` takes precedence over it; it takes precedence over the environment variable
    FASTDYNAT_KERNELS. Raises UserError for an unknown name; a backend that cannot run is refused at the call.
    """
    global _override
    _override = _known(name)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """`set_backend(name)` for the body of a with statement; "auto" keeps the current setting.

    The setting is the process's, not the thread's.
    """
    before = _override
    set_backend(before if name == "auto" else name)
    try:
        yield
    finally:
        set_backend(before)


def interpreting() -> bool:
    """True if Triton interprets its kernels on the CPU; Triton reads this when kernels are imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _why_not_native(name: str) -> str | None:
    """The reason why csrc backend `name` is missing in this build, or None."""
    if not _extension.LOADED:
        return f"the extension fastdynat._C is not built ({_extension.REBUILD})"
    if name == "cuda" and not _extension.WITH_CUDA:
        return f"fastdynat._C was built without its CUDA half (FASTDYNAT_CUDA=1 {_extension.REBUILD})"
    return None


def why_unavailable(name: str, device_type: str) -> str | None:
    """The reason why backend `name` cannot take tensors on `device_type` ("cpu", "cuda", ...), or None."""
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
    """Every backend by name, with None if it can run on this machine, else the reason why not."""
    has_gpu = torch.cuda.is_available()
    found = {name: why_unavailable(name, "cpu" if name == "cpp" else "cuda") for name in BACKENDS}
    if not has_gpu:
        found["triton"] = found["triton"] or (None if interpreting() else "no CUDA device is visible")
        found["cuda"] = found["cuda"] or "no CUDA device is visible"
    return found


def selected_backend(device_type: str, backend: str = "auto") -> str:
    """The name of the backend that runs for tensors on `device_type`, for log lines.

    Raises UserError for an unknown name and RuntimeError when the backend asked for cannot run.
    """
    asked = _asked(backend)
    if asked == "auto":
        return (*_candidates(BACKENDS, device_type), verification.REFERENCE)[0]
    _check_possible("ops", BACKENDS, asked, device_type)
    return asked


def select(op: str, implementations: Mapping[str, F], backend: str, like: Tensor) -> F:
    """The implementation of `op` to call.

    The order is: `backend`, the override of `set_backend`, FASTDYNAT_KERNELS, the fastest correct one. A
    backend that the call names runs unverified; one from the override or the environment is verified first.

    Args:
        implementations: by backend name, "eager" among them.
        like: the tensor whose device and size decide.

    Raises: as `selected_backend`; WrongImplementation where the override or the environment names an
        implementation that is wrong on this machine.
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


def permits(name: str) -> bool:
    """True unless the override or the environment asks for another backend than `name`."""
    return _asked("auto") in ("auto", name)


def usable(op: str, name: str, device: torch.device) -> bool:
    """True if implementation `name` of `op` may run on `device`: it is permitted, can run and is correct.

    For callers that name it in their calls because they have prepared for it, as that skips the verdict.
    Verifies it at the first question; while compiling or capturing, only a verdict made before counts.
    """
    if not permits(name) or why_unavailable(name, device.type) is not None:
        return False
    device = _with_index(device)
    found: Mapping[str, verification.CandidateVerdict]
    if torch.compiler.is_compiling() or capturing(device):
        _load_checks()
        found = verification.known(op, device) or {}
    else:
        found = _verdicts(op, device)
    return name in found and found[name].right


def is_native(name: str, device_type: str) -> bool:
    """True if backend `name` runs natively on the device, not interpreted or simulated."""
    return name in _PREFERENCE.get(device_type, ()) and name != verification.REFERENCE


def prepare(device: torch.device) -> None:
    """Verify now, on `device`, all implementations that would be verified at their first use.

    Call it before CUDA graphs are captured or networks compiled. A backend that the override or the
    environment names is verified alone; raises WrongImplementation if it is wrong."""
    _load_checks()
    device = _with_index(device)
    asked = _asked("auto")
    if asked == "auto":
        verification.prepare_checks(device, OPERATORS)
    elif is_native(asked, device.type) and why_unavailable(asked, device.type) is None:
        for op in OPERATORS:
            verification.insist(op, asked, device)


def operators_in_use(device: torch.device) -> str:
    """`selected_backend`, and the operators for which another one runs as it is wrong; for log lines."""
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
    """`device` with its index, as tensors on it have it."""
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
    """The backends of `offered` that can run, best first, without eager."""
    order = _PREFERENCE.get(device_type, ())
    return [
        n
        for n in order
        if n in offered and n != verification.REFERENCE and why_unavailable(n, device_type) is None
    ]


def _usable(op: str, offered: Collection[str], device: torch.device) -> tuple[str, ...]:
    """The correct implementations on `device`, the preferred one first; only that one while compiling."""
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
    """The best implementation by verdicts of this or an earlier process, else eager. Runs nothing."""
    device = torch.device(device_type) if index is None else torch.device(device_type, index)
    _load_checks()
    if op not in verification.registered():
        return names[0]
    found = verification.known(op, device) or {}
    return next((name for name in names if name in found and found[name].right), verification.REFERENCE)


def _verdicts(op: str, device: torch.device) -> Mapping[str, verification.CandidateVerdict]:
    """The verdicts on all candidates that can run on `device`; empty for an operator without a check."""
    _load_checks()
    return verification.verdicts(op, device) if op in verification.registered() else {}


def _insist(op: str, name: str, device: torch.device) -> None:
    if verification.checking() or torch.compiler.is_compiling():
        return
    found = verification.peek(op, device)
    if found is None or name not in found or found[name] is verification.SPARED:
        if capturing(device):
            if found is not None and found.get(name) is verification.SPARED:
                raise verification.WrongImplementation(
                    f"{op}: implementation {name!r} has not been checked on this machine, and cannot be "
                    f"during a capture: call fastdynat.ops.prepare within use_backend({name!r}) before it"
                )
            return
        _load_checks()
        if op not in verification.registered():
            return
    verification.insist(op, name, device)


def capturing(device: torch.device) -> bool:
    """True while a CUDA graph is captured on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _load_checks() -> None:
    """Import the cases, which commands that only list operators do not need."""
    importlib.import_module("fastdynat.ops.checks")
