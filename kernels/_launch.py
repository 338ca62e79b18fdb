"""Device context and register limits of all launchers."""

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the device of `tensor` current: Triton launches there, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def registers_for(dtype: torch.dtype, num_warps: int = 1) -> dict[str, int]:
    """Launch options of a kernel of up to 16 warps: as many registers as 512 threads can have, for float64;
    of 32 warps, half.

    Left to itself, ptxas of CUDA 13 (Triton 3.8) stops at 64, for more warps at a time, and spills what is
    beyond. That of Triton 3.9 stops at 32 where there are 16 warps or more: pass `num_warps` where a float32
    kernel needs more.
    """
    if dtype == torch.float64 and num_warps <= 16:
        return {"maxnreg": 128}
    return {"maxnreg": 64} if num_warps >= 16 else {}
