"""Verification: every implementation of an operator is compared with its reference before it is used.

The check runs on the machine at hand. Describe the computation once, next to its implementations, and ask
which of them are correct:

    CHECK = verification.register_check(
        verification.OperatorCheck(
            name="convolution_relu",
            candidates={"cudnn": fused},  # by preference; each takes the arguments of a case
            reference=lambda x, w: F.relu(F.conv2d(x, w)),
            # make(device) -> (x, w), the same at every call
            cases=lambda: [verification.Case("float32, 2x3x9x7", make)],
            # (relative, absolute) by dtype; other dtypes bit for bit
            tolerance={torch.float32: (1e-5, 1e-6)},
            why_not=lambda name, device: None if device.type == "cuda" else "needs a GPU",
            sources=(Path(__file__),),
        )
    )
    if "cudnn" in verification.right("convolution_relu", x.device):
        ...

The first question on a device runs the cases, on a thread of its own: the caller's generators, grad mode,
autocast, default device and current stream are not touched. A candidate that gives a wrong value, raises,
or changes its result from call to call is left out, with one warning. A candidate that crashes the process
is recognised by the mark that its check left behind and is not tried again. A failure that says nothing
about the candidate, such as a lack of memory or of Triton's compiler, leaves it out in this process only.

Verdicts are stored in the user's cache folder, by processor or GPU, driver, versions of torch, Triton and
fastdynat, and source files. Nothing runs while torch.compile traces or a CUDA graph is captured: call
`prepare_checks` before. ``fastdynat doctor --check`` checks all that is registered, including what takes too
long to compile at a first use: some cases (`Case.deep`), and implementations that nobody needs there, because
another one is right (`OperatorCheck.compiling`).

In reading order:
- `operator_check`: checks, cases, verdicts; `comparison`: outputs against the reference's;
- `isolated_run`: one candidate on all cases; `crash_marks`: candidates that ended their process;
- `judge`: verdicts of this process, stored or made now; `verdict_store`: their files;
- `speed`: the fastest correct implementation at a size.
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
    SPARED,
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
    "SPARED",
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
