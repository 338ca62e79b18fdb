"""One candidate on all cases, on a thread that shares no state with the caller's."""

import subprocess
import threading
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastdynat.errors import UserError, first_line, shortage
from fastdynat.execution.synchronization import waits_on_purpose
from fastdynat.verification.comparison import difference
from fastdynat.verification.operator_check import RIGHT, CandidateVerdict, Case, OperatorCheck

Value = TypeVar("Value")
CALLS = 2  # of each case: a race between threads may show in the second one only
PATIENCE = 5.0  # seconds to finish a case after Ctrl-C
_here = threading.local()
_stop = threading.Event()


class DeviceLost(UserError):
    """A kernel has broken the CUDA context of this process: every further CUDA call fails."""


def checking() -> bool:
    """True if this thread runs a check."""
    return getattr(_here, "checking", False)


def on_own_thread(run: Callable[[], Value]) -> Value:
    """`run()` on a thread of its own.

    Grad and inference mode, autocast, default device, dispatch modes, functorch levels, the current CUDA
    device and stream belong to a thread: a new one has their defaults, and the caller's are not touched.
    Warnings are dropped meanwhile: where filters turn them into errors, they would count as the candidate's.
    """
    result: list[Value] = []
    errors: list[BaseException] = []
    _stop.clear()

    def body() -> None:
        _here.checking = True
        try:
            with waits_on_purpose():
                result.append(run())
        except BaseException as error:  # raised again in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=body, name="fastdynat-verified", daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        thread.start()
        try:
            thread.join()
        except BaseException:  # Ctrl-C: a hanging kernel keeps its mark, any other case ends soon
            _stop.set()
            thread.join(PATIENCE)
            raise
    if errors:
        raise errors[0]
    return result[0]


class CheckInterrupted(Exception):
    """The caller was interrupted."""


class NotNow(Exception):
    """A candidate could not be checked. Arguments: the case and the reason."""


def not_now(error: Exception) -> str:
    """The reason why there is no verdict."""
    return f"cannot be checked now: {type(error).__name__}: {first_line(error)}"


class Prepared:
    """A check's cases on `device`: their arguments and the reference's outputs, for all candidates."""

    def __init__(self, check: OperatorCheck, device: torch.device, *, full_size: bool | None = None) -> None:
        """`full_size`: include the cases for GPUs only; None: if `device` is a GPU."""
        self.check, self.device = check, device
        self.calls: list[tuple[Case, tuple[Any, ...], Any]] = []
        for case in check.cases():
            if case.gpu_only and not (device.type == "cuda" if full_size is None else full_size):
                continue
            args = case.make(device)
            self.calls.append((case, args, check.reference(*args)))

    def examine(self, candidate: str, note: Callable[[str], None], *, deep: bool = True) -> CandidateVerdict:
        """Run `candidate` on every case.

        Args:
            note: called with the name of each case before it runs.
            deep: False leaves out `Case.deep` cases for a candidate that compiles at its calls.

        Raises:
            NotNow: there is no verdict, as memory or a compiler is missing.
            DeviceLost: the CUDA context is broken. Its second argument is the verdict.
        """
        run = self.check.candidates[candidate]
        spared = not deep and candidate in self.check.compiling
        for number, (case, args, expected) in enumerate(self.calls):
            if case.deep and spared:
                continue
            note(case.name)
            if _stop.is_set():
                raise CheckInterrupted
            try:
                found = self._of_case(run, case, args, expected)
            except Exception as error:  # any error is the finding
                if _of_the_moment(error) and not lost(self.device):
                    raise NotNow(case.name, not_now(error)) from None
                found = f"failed: {type(error).__name__}: {first_line(error)}"
                if lost(self.device):
                    verdict = CandidateVerdict(False, case.name, found)
                    raise DeviceLost(_lost(self.check.name, candidate, verdict), verdict) from None
            if found:
                # Made anew for the next candidate, as this one may have written to them.
                self.calls[number] = (case, case.make(self.device), expected)
                return CandidateVerdict(False, case.name, found)
        return RIGHT

    def _of_case(self, run: Callable[..., Any], case: Case, args: tuple[Any, ...], expected: Any) -> str:
        before = [t.clone() if isinstance(t, Tensor) else t for t in args]
        kept = []  # alive, so that no call reuses the memory of an earlier one, which holds the right values
        for number in range(CALLS):
            _poison(expected)
            kept.append(run(*args))
            if found := difference(kept[-1], expected, self.check.tolerance, case.scale):
                return found if number == 0 else f"another result at call {number + 1}: {found}"
            if found := _changed(args, before):
                return found
        return ""


def _poison(outputs: Any) -> None:
    """Fill the memory that the next outputs will probably get with NaN, to reveal elements never written."""
    tensors = [
        t for t in (outputs if isinstance(outputs, (tuple, list)) else [outputs]) if isinstance(t, Tensor)
    ]
    sizes = [(t.numel() * t.element_size(), t.device) for t in tensors] * 4
    # Held all at once, so that each is a separate block.
    kept = [torch.empty(size, dtype=torch.uint8, device=device).fill_(0xFF) for size, device in sizes]
    kept.clear()


def _changed(args: tuple[Any, ...], before: list[Any]) -> str:
    for number, (now, then) in enumerate(zip(args, before, strict=True)):
        if isinstance(now, Tensor) and (found := difference(now.contiguous(), then.contiguous(), {})):
            return f"argument {number} was changed: {found}"
    return ""


def _of_the_moment(error: Exception) -> bool:
    """True if `error` says nothing about the candidate: no memory, a full disk, no compiler for Triton."""
    missing = ("Failed to find C compiler", "Cannot find ptxas")
    return (
        shortage(error) is not None
        or isinstance(error, (OSError, subprocess.SubprocessError))
        or any(text in str(error) for text in missing)
    )


def lost(device: torch.device) -> bool:
    """True if the CUDA context is broken: an error inside a kernel is permanent, one at its launch is not."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _lost(name: str, candidate: str, verdict: CandidateVerdict) -> str:
    return (
        f"{name}: implementation {candidate!r} broke the CUDA context ({verdict.case}: {verdict.detail}), "
        f"which no process survives; start again: from now on {candidate!r} is left out for {name} "
        "on this machine"
    )
