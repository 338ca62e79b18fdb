"""Device and precision of a command, and the use of torch.compile on that device."""

import os
import shutil
from typing import NamedTuple

import torch

from fastdynat.errors import UserError
from fastdynat.machine.capability import half_types
from fastdynat.ops import (
    available_backends,
    permits,
    prepare,
    selected_backend,
    use_backend,
    winograd_usable,
)
from fastdynat.tuning import ANY, MARGIN, Workload, choose, slower_than_float32
from fastdynat.verification import WrongImplementation

# What a sentence about a flag says to a caller from Python.
KEYWORDS = (
    ("a bare --amp", "amp=True"),
    ("--amp bf16", "amp=torch.bfloat16"),
    ("--amp fp16", "amp=torch.float16"),
    ("--amp", "amp=True"),
)
# Autocast's type for each --amp.
AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device called `name` ("cpu", "cuda", "cuda:N"; "auto" is a GPU if there is one).

    Raises:
        UserError: another kind of device, or one that this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"device {name!r} cannot be used ({reason}); `fastdynat doctor` lists the devices of this machine"
        ) from None
    return device


class AmpChoice(NamedTuple):
    """A precision, "off", "bf16" or "fp16", and a note for the user; "" where there is nothing to note."""

    amp: str
    note: str = ""


class HalfChoice(NamedTuple):
    """A half-precision type (None: float32), and a note for the user; "" where there is nothing to note."""

    dtype: torch.dtype | None
    note: str = ""


def pick_amp(
    mode: str,
    device: torch.device,
    *,
    winograd: bool = True,
    work: Workload = ANY,
) -> AmpChoice:
    """The precision that `mode` means on `device`, with the reason.

    Args:
        mode: "default" is bf16 on a GPU with hardware for it, else off: nobody's numbers change without being
            asked for; "auto" is the fastest, known or measured (`fastdynat.tuning`); any other is itself.
        winograd: float32 may use Winograd's algorithm.
        work: the convolutions in hand.
    """
    if mode == "default":
        amp = "bf16" if device.type == "cuda" and not half_types(device)["bf16"] else "off"
        return AmpChoice(
            amp, "" if amp == "off" else f"precision: {amp}, which this GPU supports; --amp off for float32"
        )
    if mode == "auto":
        found = choose(device, winograd=winograd, work=work)
        used = "float32" if found.amp == "off" else found.amp
        return AmpChoice(found.amp, f"--amp: {found.why}; computing in {used}")
    if mode != "off" and (slower := _slower(mode, device)):
        return AmpChoice(mode, f"--amp {mode}: {slower}; a bare --amp chooses what is fast")
    return AmpChoice(mode)


def _slower(amp: str, device: torch.device) -> str:
    """The reason why half precision `amp` is slower on `device` than float32, as a clause; or ""."""
    lacking = half_types(device)[amp]
    if device.type == "cuda":
        return lacking
    factor = slower_than_float32(amp, device)
    if factor <= 1 + MARGIN:
        return ""
    return f"{lacking or f'{amp} is slow here'}, convolutions take {factor:.2g}x as long as in float32"


def pick_half(amp: bool | torch.dtype, device: torch.device) -> HalfChoice:
    """`pick_amp` for callers from Python: True is the fastest precision, a dtype is itself, False is None.

    The note is left out where half precision was asked for and is used.
    """
    if amp is False:
        return HalfChoice(None)
    mode = "auto" if amp is True else next(name for name, dtype in AMP_DTYPES.items() if dtype is amp)
    name, note = pick_amp(mode, device)
    dtype = AMP_DTYPES[name]
    if amp is True and dtype is not None:
        return HalfChoice(dtype)
    for flag, keyword in KEYWORDS:
        note = note.replace(flag, keyword)
    return HalfChoice(dtype, note)


def pick_channels_last(
    amp: str, device: torch.device, *, winograd: bool = True, work: Workload = ANY
) -> bool:
    """True if channels-last is the faster memory format on `device`, in precision `amp`, for `work`."""
    return choose(device, amps=(amp,), winograd=winograd, work=work).channels_last


def winograd_pays(device: torch.device, amp: str, *, channels_last: bool, work: Workload = ANY) -> bool:
    """True if Winograd's algorithm beats the direct one on `device`; `WinogradConv2d` decides by layer."""
    if device.type != "cpu" or amp != "off":
        return False
    return choose(device, amps=("off",), channels_last=channels_last, work=work).winograd


def check_compile(mode: str, device: torch.device) -> None:
    """Raise UserError where ``torch.compile`` would fail at its first call for want of a compiler; "auto"
    does without.
    """
    names = ("g++", "c++", "clang++") if device.type == "cpu" else ("gcc", "cc", "clang")
    own = os.environ.get("CXX" if device.type == "cpu" else "CC", "")
    if mode not in ("off", "auto") and not any(shutil.which(name) for name in (*own.split()[:1], *names)):
        raise UserError(
            f"--compile needs a compiler ({' or '.join(names)}): install g++, or leave --compile out"
        )


def check_kernels(name: str, device: torch.device) -> None:
    """Raise UserError where the operators cannot run as `name` asks on `device`, or are wrong there.

    Verifies those that this machine has not verified yet, before graphs are captured and networks compiled.
    """
    remedy = "leave --kernels out to use the fastest one that is correct here"
    try:
        selected_backend(device.type, name)
        with use_backend(name):
            prepare(device)
    except WrongImplementation as error:
        raise UserError(f"{error}; {remedy}") from None
    except RuntimeError as error:
        raise UserError(f"--kernels {name}: {str(error).partition(': ')[2]}; {remedy}") from None


def check_winograd(device: torch.device, amp: str) -> None:
    """Raise UserError where no convolution can be computed by Winograd's algorithm: it is for float32 on the
    CPU, by a compiled kernel. To be called under `use_backend` with the run's operators.
    """
    if device.type != "cpu" or amp != "off":
        raise UserError(
            f"--winograd on is for float32 on the CPU, got {device} with --amp {amp}; leave it out"
        )
    if (missing := available_backends()["cpp"]) is not None:
        raise UserError(f"--winograd on: {missing}; leave it out")
    if not permits("cpp"):
        raise UserError("--winograd on is a kernel of --kernels cpp; leave out one of the two flags")
    if not winograd_usable(device):
        raise UserError(
            "--winograd on: its kernel is wrong on this machine (`fastdynat doctor --check`); leave it out"
        )
