"""Implementations that are compared with a reference on the machine where they are to run, before they run.

To add one: describe the computation once, where its implementations are, and ask which of them is right.

    CHECK = verified.register(verified.Check(
        name="convolution_relu", candidates={"cudnn": fused},                       # take the arguments of a
        case; the preferred one first reference=lambda x, w: F.relu(F.conv2d(x, w)), cases=lambda:
        [verified.Case("float32, 2x3x9x7", make)],   # make(device) -> (x, w), always the same
        tolerance={torch.float32: (1e-5, 1e-6)},           # relative and absolute, by dtype; else bit by bit
        why_not=lambda name, device: None if device.type == "cuda" else "needs a GPU",
        sources=(Path(__file__),), within=exact_float32,
    ))

    if "cudnn" in verified.right("convolution_relu", x.device):
        ...
    verified.fastest("convolution_relu", x.device, "128x64x32x32", {"cudnn": call, "eager": other})   # of
    right ones

The first question on a device runs the table, on a thread of its own: the caller's generators, grad mode,
autocast, default device and current stream are not touched; the allocator's peak statistics on a GPU include
the few MiB of the cases. An implementation with a wrong value, an exception or a result that changes from
call to call is left out, with one warning. One that crashes the process is recognised by the mark that its
check left and not tried again (`marks`). What says nothing about an implementation, such as no memory or no
compiler for Triton, leaves it out in this process only. Verdicts are kept in the user's cache folder for this
processor or GPU, driver, version of torch, Triton and fastdynat, and these sources. Nothing is run while
torch.compile traces or a CUDA graph is captured: `prepare_checks` before. ``fastdynat doctor --check`` shows all
that is registered, checked with the cases that are too many to compile at a first use (`Case.deep`) as well.
"""

from fastdynat.verification.isolated_run import DeviceLost, checking
from fastdynat.verification.judge import (
    WrongImplementation,
    describe_verdict,
    insist,
    known,
    peek,
    prepare_checks,
    right,
    verdicts,
)
from fastdynat.verification.operator_check import (
    REFERENCE,
    RIGHT,
    CandidateVerdict,
    Case,
    OperatorCheck,
    Timing,
    register_check,
    registered,
)
from fastdynat.verification.speed import fastest, timed, winner

__all__ = [
    "REFERENCE",
    "RIGHT",
    "CandidateVerdict",
    "Case",
    "DeviceLost",
    "OperatorCheck",
    "Timing",
    "WrongImplementation",
    "checking",
    "describe_verdict",
    "fastest",
    "insist",
    "known",
    "peek",
    "prepare_checks",
    "register_check",
    "registered",
    "right",
    "timed",
    "verdicts",
    "winner",
]
