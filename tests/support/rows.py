"""Helpers of the tests of operators on logits."""

import pytest
import torch
from conftest import needs
from torch import Tensor

NAN, INF = float("nan"), float("inf")
WIDE = (torch.float32, torch.float64)
DTYPES = (*WIDE, torch.bfloat16, torch.float16)
ON_CPU = [
    "eager",
    pytest.param("cpp", marks=needs("ext")),
    pytest.param(
        "triton", marks=[needs("triton"), pytest.mark.skipif(torch.cuda.is_available(), reason="see ON_GPU")]
    ),
]
# numpy's warnings, from Triton's interpreter: rows with infinities compute inf - inf.
QUIET = pytest.mark.filterwarnings(
    "ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning"
)
ON_GPU = [pytest.param(name, marks=[needs("gpu"), pytest.mark.gpu]) for name in ("eager", "cuda", "triton")]
# Every walk: lanes over rows and over classes on the CPU; parts of a warp, a warp, a block per row on GPUs.
SHAPES = [(0, 3), (1, 3), (33, 10), (5, 17), (3, 100), (2, 129), (2, 1001), (1, 1030)]
LARGE = 1e4


def scores(n: int, k: int, dtype: torch.dtype = torch.float32, spread: float = 3.0) -> Tensor:
    return (torch.randn(n, k) * spread).to(dtype)


def classes(n: int, k: int) -> Tensor:
    return torch.randint(0, k, (n,))


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Equal up to the rounding of `dtype` (default: of `actual`), relative to each value."""
    eps = torch.finfo(dtype or actual.dtype).eps
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=16 * eps, atol=4 * eps, equal_nan=True
    )
