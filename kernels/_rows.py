"""Shared parts of the kernels on logits. A program holds BLOCK_ROWS rows of BLOCK_K >= K classes."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_CLASSES = 1 << 20  # the largest block Triton allows
PROGRAMS = 256  # that keep every multiprocessor of a large GPU busy


@triton.jit
def rounded_quotient(a, b):
    """a / b to the nearest number; Triton's own division of float32 is off by up to two units in the last
    place.
    """
    return a / b if b.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def argmax_rows(values, cols):
    """(R, K) values -> (R, 1) largest, NaN if a row has one, (R, 1) its column. Padding must be -inf."""
    none = 2147483647
    is_nan = values != values
    top = tl.max(tl.where(is_nan, float("-inf"), values), axis=1, keep_dims=True)
    first = tl.min(tl.where(values == top, cols, none), axis=1, keep_dims=True)
    first_nan = tl.min(tl.where(is_nan, cols, none), axis=1, keep_dims=True)
    has_nan = first_nan < none
    return tl.where(has_nan, float("nan"), top), tl.where(has_nan, first_nan, first)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0 without losing a small x; NaN for NaN."""
    u = 1.0 + x
    # log(u) is off by the rounding of u; the factor x / (u - 1) puts that right (Goldberg 1991, theorem 4).
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


def wide_dtype(logits: Tensor) -> torch.dtype:
    """The dtype that the kernels compute in."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def block_of(k: int) -> int:
    """The block that holds a row of k classes. Raises ValueError for more than Triton can hold."""
    if k > MAX_CLASSES:
        raise ValueError(
            f'Triton kernels take up to {MAX_CLASSES} classes, got {k}: use backend="cuda" or "eager"'
        )
    return triton.next_power_of_2(k)


def blocks(n: int, k: int) -> tuple[int, dict[str, Any]]:
    """The grid for (n, k) logits and block sizes: about 2048 values per program, or one longer row."""
    block_k = block_of(k)
    # Rows of a small batch are spread over the GPU before they are gathered into full tiles.
    block_rows = min(max(1, 2048 // block_k), triton.next_power_of_2(triton.cdiv(max(n, 1), PROGRAMS)))
    warps = min(16, max(1, block_rows * block_k // 256))
    sizes = {"BLOCK_ROWS": block_rows, "BLOCK_K": block_k, "num_warps": warps}
    if block_k > 16384:  # beyond what 16 warps hold: as many threads as there are, with all of the registers
        sizes |= {"num_warps": 32, "maxnreg": 64}
    return triton.cdiv(n, block_rows), sizes
