"""Running one candidate on the table of cases, on a thread that shares no state with the caller's."""

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
PATIENCE = 5.0  # seconds after Ctrl-C
_here = threading.local()
_stop = threading.Event()


class DeviceLost(UserError):
    """A kernel has made this process' CUDA context unusable: every further call fails, whatever it is."""


def checking() -> bool:
    """Whether this thread is the one that runs a check."""
    return getattr(_here, "checking", False)


def apart(run: Callable[[], Value]) -> Value:
    """`run()` on a thread of its own.

    Grad and inference mode, autocast, default device, dispatch modes, functorch levels, the current CUDA
    device and stream belong to a thread: there they are what they are at the start of a process, and the
    caller's are not touched. Warnings are dropped meanwhile: as errors, which filters can make them, they
    would be taken for the candidate's.
    """
    result: list[Value] = []
    errors: list[BaseException] = []
    _stop.clear()

    def body() -> None:
        _here.checking = True
        try:
            with waits_on_purpose():
                result.append(run())
        except BaseException as error:  # goes on in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=body, name="fastdynat-verified", daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        thread.start()
        try:
            thread.join()
        except BaseException:  # Ctrl-C: a kernel that hangs keeps its mark, and any other case is soon over
            _stop.set()
            thread.join(PATIENCE)
            raise
    if errors:
        raise errors[0]
    return result[0]


class CheckInterrupted(Exception):
    """The caller was interrupted."""


class NotNow(Exception):
    """A candidate could not be checked: at which case, and why."""


def not_now(error: Exception) -> str:
    """Why there is no verdict."""
    return f"cannot be checked now: {type(error).__name__}: {first_line(error)}"


class Prepared:
    """A check's cases with their arguments and the reference's outputs on `device`, for all of its
    candidates.
    """

    def __init__(self, check: OperatorCheck, device: torch.device, *, full_size: bool | None = None) -> None:
        """`full_size`: with the cases that are for GPUs only; None: where `device` is one."""
        self.check, self.device = check, device
        self.calls: list[tuple[Case, tuple[Any, ...], Any]] = []
        for case in check.cases():
            if case.gpu_only and not (device.type == "cuda" if full_size is None else full_size):
                continue
            args = case.make(device)
            self.calls.append((case, args, check.reference(*args)))

    def examine(self, candidate: str, note: Callable[[str], None], *, deep: bool = True) -> CandidateVerdict:
        """Run `candidate` on every case. `note` is told which case comes next, before it can do any harm.

        deep: False spares a candidate that compiles at its calls the cases that are `Case.deep`.

        Raises:
            NotNow: there is no verdict, for want of memory or a compiler.
            DeviceLost: nothing can run on the device any more. Its second argument is the verdict.
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
            except Exception as error:  # whatever goes wrong in there is the finding
                if _of_the_moment(error) and not lost(self.device):
                    raise NotNow(case.name, not_now(error)) from None
                found = f"failed: {type(error).__name__}: {first_line(error)}"
                if lost(self.device):
                    verdict = CandidateVerdict(False, case.name, found)
                    raise DeviceLost(_lost(self.check.name, candidate, verdict), verdict) from None
            if found:
                # The next candidate's arguments, if this one has written to them.
                self.calls[number] = (case, case.make(self.device), expected)
                return CandidateVerdict(False, case.name, found)
        return RIGHT

    def _of_case(self, run: Callable[..., Any], case: Case, args: tuple[Any, ...], expected: Any) -> str:
        before = [t.clone() if isinstance(t, Tensor) else t for t in args]
        kept = []  # so that no call is given the memory of an earlier one, with the right values in it
        for number in range(CALLS):
            _poison(expected)
            kept.append(run(*args))
            if found := difference(kept[-1], expected, self.check.tolerance, case.scale):
                return found if number == 0 else f"another result at call {number + 1}: {found}"
            if found := _changed(args, before):
                return found
        return ""


def _poison(outputs: Any) -> None:
    """Leave NaN in the memory that is probably given to the next outputs, so that an element never written
    shows.
    """
    tensors = [
        t for t in (outputs if isinstance(outputs, (tuple, list)) else [outputs]) if isinstance(t, Tensor)
    ]
    sizes = [(t.numel() * t.element_size(), t.device) for t in tensors] * 4
    # All at once, so that each is a block of its own.
    kept = [torch.empty(size, dtype=torch.uint8, device=device).fill_(0xFF) for size, device in sizes]
    kept.clear()


def _changed(args: tuple[Any, ...], before: list[Any]) -> str:
    for number, (now, then) in enumerate(zip(args, before, strict=True)):
        if isinstance(now, Tensor) and (found := difference(now.contiguous(), then.contiguous(), {})):
            return f"argument {number} was changed: {found}"
    return ""


def _of_the_moment(error: Exception) -> bool:
    """Whether `error` says nothing about a candidate: no memory, no room on a disk, no compiler that Triton
    needs.
    """
    missing = ("Failed to find C compiler", "Cannot find ptxas")
    return (
        shortage(error) is not None
        or isinstance(error, (OSError, subprocess.SubprocessError))
        or any(text in str(error) for text in missing)
    )


def lost(device: torch.device) -> bool:
    """Whether the device fails on its own: an error of a kernel, unlike one of a launch, stays for good."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _lost(name: str, candidate: str, verdict: CandidateVerdict) -> str:
    return (
        f"{name}: implementation {candidate!r} broke the CUDA context ({verdict.case}: {verdict.detail}), which no process "
        f"survives; start again: from now on {candidate!r} is left out for {name} on this machine"
    )
