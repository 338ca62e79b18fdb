"""Which implementation of an operator runs, and why another one cannot."""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch

from fastdynat.errors import unknown_name
from fastdynat.ops import _extension

BACKENDS = ("triton", "cuda", "cpp", "eager")
ENVIRONMENT = "FASTDYNAT_KERNELS"

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


def why_not(name: str, device_type: str) -> str | None:
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
    found = {name: why_not(name, "cpu" if name == "cpp" else "cuda") for name in BACKENDS}
    if not has_gpu:
        found["triton"] = found["triton"] or (None if interpreting() else "no CUDA device is visible")
        found["cuda"] = found["cuda"] or "no CUDA device is visible"
    return found


def selected_backend(device_type: str, backend: str = "auto") -> str:
    """The name of the backend that runs for tensors on `device_type`, for a log line.

    Raises UserError for an unknown name and RuntimeError when the backend asked for cannot run.
    """
    return _choose("ops", BACKENDS, backend, device_type)


def select(op: str, implementations: Mapping[str, F], backend: str, device_type: str) -> F:
    """The implementation of `op` to call: `backend`, else the override, else FASTDYNAT_KERNELS, else the best.

    implementations: by backend name; "eager" must be there. Raises as `selected_backend`.
    """
    return implementations[_choose(op, implementations, backend, device_type)]


def _choose(op: str, offered: Mapping[str, Any] | tuple[str, ...], backend: str, device_type: str) -> str:
    asked = _known(backend)
    if asked == "auto":
        asked = _override
    if asked == "auto":
        asked = _known(os.environ.get(ENVIRONMENT) or "auto")
    if asked != "auto":
        reason = why_not(asked, device_type) if asked in offered else "this operator has no such implementation"
        if reason is not None:
            raise RuntimeError(f"{op}: backend {asked!r} cannot run: {reason}")
        return asked
    for name in _PREFERENCE.get(device_type, ()):
        if name in offered and why_not(name, device_type) is None:
            return name
    return "eager"
