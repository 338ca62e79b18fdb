"""True float32: contexts without TF32 or bfloat16 products, which torch allows cuDNN's convolutions by
default.

TF32 rounds the factors of a product to 10 bits. Training may use it; results that are compared or counted are
computed in full float32.

torch 2.9 and later have two interfaces to these flags: the older `allow_tf32` and
`set_float32_matmul_precision`, and `fp32_precision` by backend and operation. The older one raises where it
is read while the newer one says otherwise (aten/src/ATen/Context.cpp), and its "off" gives way to
`torch.backends.fp32_precision`. Within `full_float32` both say "off", and both are afterwards what they were,
whichever of them the caller uses.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

C: Any = torch._C  # torch.backends.mkldnn.fp32_precision reads one flag and writes another
PARENTS = (
    ("cuda", "all"),
    ("mkldnn", "all"),
)  # what "none" below falls back to; they fall back to ("generic", "all")
LEAVES = tuple((backend, op) for backend in ("cuda", "mkldnn") for op in ("matmul", "conv", "rnn"))
Flags = list[tuple[tuple[str, str], str]]


@contextmanager
def full_float32() -> Iterator[None]:
    """A context (or decorator) in which float32 convolutions and matrix products use no TF32, on any device.

    The flags are the process's, not the thread's. A CUDA graph keeps the precision that it was captured in,
    and compiled code calls convolutions that read the flags when they run.
    """
    before = float32_flags()
    try:
        C._set_cudnn_allow_tf32(False)
        C._set_float32_matmul_precision("highest")
        _write([(leaf, "ieee") for leaf in LEAVES])
        yield
    finally:
        put_float32_flags(before)


def tf32_allowed() -> bool:
    """True if the current flags allow cuDNN to compute float32 convolutions in TF32."""
    return bool(C._get_fp32_precision_getter("cuda", "conv") == "tf32")


def tf32_convolutions(device: torch.device) -> bool:
    """True if float32 convolutions on `device` currently use TF32: if allowed, from Ampere on."""
    return device.type == "cuda" and tf32_allowed() and torch.cuda.get_device_capability(device) >= (8, 0)


@contextmanager
def products_like_convolutions() -> Iterator[None]:
    """A context in which float32 matrix products on a GPU have the precision of its convolutions."""
    own, (_, allowed) = _read((("cuda", "matmul"),)), _read((("cuda", "conv"),))[0]
    _write([(("cuda", "matmul"), allowed)])
    try:
        yield
    finally:
        _write(own)


def float32_name(device: torch.device, name: str = "float32") -> str:
    """`name`, with "(TF32 convolutions)" if convolutions on `device` currently use TF32."""
    return f"{name} (TF32 convolutions)" if tf32_convolutions(device) else name


@dataclass(frozen=True)
class Float32Flags:
    """The flags of both interfaces: each flag's own value, without the one it falls back to."""

    allow_tf32: bool
    matmul: str
    newer: Flags


def float32_flags() -> Float32Flags:
    """The current flags, however the caller has mixed the two interfaces."""
    top = ("generic", "all")
    newer = [(top, C._get_fp32_precision_getter(*top))]
    # A flag's own value shows where nothing is left to fall back to.
    _write([(top, "none")])
    newer += _read(PARENTS)
    _write([(parent, "none") for parent in PARENTS])
    newer += _read(LEAVES)
    # The older flags' values show where the newer ones do not contradict them.
    _write([(("cuda", "conv"), "tf32"), (("cuda", "rnn"), "tf32")])
    try:
        allowed = C._get_cudnn_allow_tf32()
    except RuntimeError:
        allowed = False
    _write([(("cuda", "matmul"), "ieee"), (("mkldnn", "matmul"), "ieee")])
    flags = Float32Flags(allowed, C._get_float32_matmul_precision(), newer)
    put_float32_flags(flags)
    return flags


def put_float32_flags(flags: Float32Flags) -> None:
    """Restore flags that `float32_flags` returned."""
    C._set_cudnn_allow_tf32(flags.allow_tf32)  # these two write newer flags as well
    C._set_float32_matmul_precision(flags.matmul)
    _write(flags.newer)


def _read(keys: tuple[tuple[str, str], ...]) -> Flags:
    return [(key, C._get_fp32_precision_getter(*key)) for key in keys]


def _write(flags: Flags) -> None:
    for (backend, op), value in flags:
        C._set_fp32_precision_setter(backend, op, value)
