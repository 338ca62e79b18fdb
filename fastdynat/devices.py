"""Which device and precision a command runs with, and whether torch.compile can work there."""

import os
import shutil

import torch

from fastdynat.errors import UserError
from fastdynat.ops import available_backends, selected_backend

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
        raise UserError(f"device {name!r} cannot be used ({reason}); `fastdynat doctor` says what this machine has") from None
    return device


def pick_amp(mode: str, device: torch.device) -> str:
    """`mode`, or for "auto" what suits `device`: bf16 on a GPU with hardware for it, else off."""
    if mode != "auto":
        return mode
    return "bf16" if device.type == "cuda" and half_type(device) is torch.bfloat16 else "off"


def half_type(device: torch.device) -> torch.dtype:
    """The half-precision type that suits `device`: bfloat16, or float16 on a GPU without hardware for it."""
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    return torch.float16 if old else torch.bfloat16


def check_compile(mode: str, device: torch.device) -> None:
    """Raise UserError where ``torch.compile`` would fail at its first call for want of a compiler."""
    names = ("g++", "c++", "clang++") if device.type == "cpu" else ("gcc", "cc", "clang")
    own = os.environ.get("CXX" if device.type == "cpu" else "CC", "")
    if mode != "off" and not any(shutil.which(name) for name in (*own.split()[:1], *names)):
        raise UserError(f"--compile needs a compiler ({' or '.join(names)}): install g++, or leave --compile out")


def check_kernels(name: str, device: torch.device) -> None:
    """Raise UserError where the operators cannot run as `name` asks on `device`."""
    try:
        selected_backend(device.type, name)
    except RuntimeError as error:
        reason = str(error).partition(": ")[2]
        raise UserError(f"--kernels {name}: {reason}; leave --kernels out for the best that this machine has") from None


def check_winograd(device: torch.device, amp: str) -> None:
    """Raise UserError where no convolution can be computed by Winograd's algorithm: it is for float32 on the CPU."""
    if device.type != "cpu" or amp != "off":
        raise UserError(f"--winograd on is for float32 on the CPU, got {device} with --amp {amp}; leave it out")
    if (missing := available_backends()["cpp"]) is not None:
        raise UserError(f"--winograd on: {missing}; leave it out")
