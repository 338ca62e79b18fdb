"""Templates of a new operator's files: an elementwise example, clamp(scale * x, lo, hi), in every backend."""

OPS = '''"""TODO: name the operator in one line; the example is clamp(scale * x, lo, hi)."""

from typing import Any

import torch
from torch import Tensor

from fastdynat.ops._layout import one_order
from fastdynat.ops._register import register_operator
from fastdynat.ops._select import select
from fastdynat.ops._step import IMAGE_DTYPES

OP = "$name"


def _eager(x: Tensor, scale: float, lo: float, hi: float) -> Tensor:
    """The reference. Its signature is the operator's schema: kernels take the same arguments."""
    return (scale * x).clamp(lo, hi)


def _fake(x: Tensor, **_: Any) -> Tensor:
    return torch.empty_like(x)


IMPLEMENTATIONS = register_operator(OP, eager=_eager, fake=_fake)


def $name(
    x: Tensor, *, scale: float, lo: float = 0.0, hi: float = 1.0, backend: str = "auto"
) -> Tensor:
    """Return clamp(scale * x, lo, hi) as a new, detached tensor. Bitwise the same in every backend.

    Args:
        x: any shape, float32 or float64. Its memory layout is the result's; a NaN stays.
        scale: factor.
        lo, hi: bounds, lo <= hi.
        backend: "auto" or one of `fastdynat.ops.BACKENDS`.

    Raises:
        ValueError: dtype or bounds do not fit; UserError for an unknown backend.
        RuntimeError: the backend asked for cannot run here.
    """
    if x.dtype not in IMAGE_DTYPES:
        raise ValueError(f"{OP}: x must be float32 or float64, got {x.dtype}")
    if not lo <= hi:
        raise ValueError(f"{OP}: lo must not exceed hi, got lo={lo} and hi={hi}")
    run = select(OP, IMPLEMENTATIONS, backend, x)
    (x,) = one_order(x.detach())
    return run(x, float(scale), float(lo), float(hi))
'''

TRITON = '''"""TODO: name the kernel in one line; the example is clamp(scale * x, lo, hi)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdynat.kernels._launch import on_device_of

BLOCK = 1024


@triton.jit
def ${name}_kernel(
    x_ptr,  # (n,) float32 or float64, dense
    out_ptr,  # (n,) dtype of x; not aliased with the inputs
    n,
    scale: tl.float64,  # an unannotated float would reach float64 tensors rounded to float32
    lo: tl.float64,
    hi: tl.float64,
    BLOCK: tl.constexpr,
):
    """One block of elements per program. Grid: (blocks,)."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask)
    scale = tl.full((1,), scale, x.dtype)
    lo = tl.full((1,), lo, x.dtype)
    hi = tl.full((1,), hi, x.dtype)
    x = scale * x
    x = tl.where(x < lo, lo, x)  # false for a NaN, which stays
    x = tl.where(x > hi, hi, x)
    tl.store(out_ptr + offsets, x, mask=mask)


def $name(x: Tensor, scale: float, lo: float, hi: float) -> Tensor:
    """Launch the kernel on the current stream; returns the result, laid out as `x`, which must be dense."""
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    with on_device_of(x):
        ${name}_kernel[(triton.cdiv(out.numel(), BLOCK),)](
            x, out, out.numel(), scale, lo, hi, BLOCK=BLOCK, enable_fp_fusion=False
        )
    return out
'''

HEADER = """// Shared by the CPU and the CUDA half of fastdynat::$name: the arithmetic and the checks.
#pragma once

#include "inline.h"
#include "tensor.h"

namespace fastdynat {

template <typename T>
struct $Class {
  T scale, lo, hi;

  FASTDYNAT_INLINE T operator()(T x) const {
    x = scale * x;
    x = x < lo ? lo : x;  // false for a NaN, which stays
    return x > hi ? hi : x;
  }
};

// Checks `x`, allocates the result and calls f(out, $Class<T>).
template <typename F>
Tensor run_$name(const Tensor& x, double scale, double lo, double hi, const F& f) {
  STD_TORCH_CHECK(is_dense(x), "$name: x must be dense");
  Tensor out = empty_like(x, x.scalar_type());
  if (out.numel() == 0) return out;
  with_image_type("$name", "x", x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    f(out, $Class<T>{static_cast<T>(scale), static_cast<T>(lo), static_cast<T>(hi)});
  });
  return out;
}

}  // namespace fastdynat
"""

CPP = """// fastdynat::$name on the CPU.
#include "$name.h"

#include "parallel.h"

namespace fastdynat {
namespace {

template <typename T>
void run_elements(const Tensor& x, Tensor& out, $Class<T> op) {
  const T* from = data<T>(x);
  T* to = mutable_data<T>(out);
  parallel<T>(out.numel(), 1, [=](int64_t begin, int64_t end) FASTDYNAT_INLINE_BODY {
    for (int64_t i = begin; i < end; ++i) to[i] = op(from[i]);
  });
}

Tensor ${name}_cpu(const Tensor& x, double scale, double lo, double hi) {
  return run_$name(x, scale, lo, hi, [&](Tensor& out, auto op) { run_elements(x, out, op); });
}

}  // namespace
}  // namespace fastdynat

// The schema is defined in fastdynat/ops, which also works where this library is not built.
STABLE_TORCH_LIBRARY_IMPL(fastdynat, CPU, m) {
  m.impl("$name", TORCH_BOX(&fastdynat::${name}_cpu));
}
"""

CUDA = """// fastdynat::$name on CUDA devices.
#include "../$name.h"

#include "launch.cuh"

namespace fastdynat {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads) ${name}_kernel(
    const T* __restrict__ x, T* __restrict__ out, int64_t n, $Class<T> op) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    out[i] = op(x[i]);
  }
}

template <typename T>
void launch_elements(const Tensor& x, Tensor& out, $Class<T> op, cudaStream_t stream) {
  const int64_t n = out.numel();
  const int64_t grid = blocks_for(n, kThreads);
  launch(${name}_kernel<T>, grid, kThreads, stream, data<T>(x), mutable_data<T>(out), n, op);
}

Tensor ${name}_cuda(const Tensor& x, double scale, double lo, double hi) {
  const OnDevice device(x);
  return run_$name(
      x, scale, lo, hi, [&](Tensor& out, auto op) { launch_elements(x, out, op, device.stream); });
}

}  // namespace
}  // namespace fastdynat

STABLE_TORCH_LIBRARY_IMPL(FASTDYNAT_LIBRARY, FASTDYNAT_KEY, m) {
  m.impl("$name", TORCH_BOX(&fastdynat::${name}_cuda));
}
"""

CASES = '''"""Cases of `$name`, compared bit for bit: dtypes, layouts, odd sizes, no elements."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdynat.ops import $name
from fastdynat.ops.checks.case_helpers import (
    WIDE,
    Layout,
    at_full_size,
    channels_last,
    contiguous,
    named,
    normal,
    register_cases,
    shaped,
    with_gaps,
)
from fastdynat.verification import Case, Timing

LARGE = (256, 3, 32, 32)


def ${name}_arguments(
    device: torch.device, *, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout
) -> tuple[Tensor]:
    """(x,), with a NaN where there is an element."""
    x = normal(shape, 1)
    x.view(-1)[:1] = math.nan
    return (layout(x.to(device, dtype)),)


def run_$name(x: Tensor, backend: str) -> Tensor:
    """`$name` in one implementation."""
    return $name(x, scale=0.7, lo=-0.5, hi=0.5, backend=backend)


def ${name}_cases() -> list[Case]:
    """The cases of `$name`."""
    layouts = {"contiguous": contiguous, "channels-last": channels_last, "with gaps": with_gaps}
    calls = [((3, 3, 5, 7), dtype, layout) for dtype in WIDE for layout in layouts]
    calls += [(shape, torch.float32, "contiguous") for shape in ((0, 3, 4, 4), (1,), (2, 1025))]
    cases = []
    for shape, dtype, layout in calls:
        make = partial(${name}_arguments, shape=shape, dtype=dtype, layout=layouts[layout])
        cases.append(Case(f"{named(dtype)}, {shaped(shape)}, {layout}", make))
    return [*cases, at_full_size(${name}_timing())]


def ${name}_timing() -> Timing:
    """The timed call of `$name`: one read and one write per element."""
    make: Any = partial(${name}_arguments, shape=LARGE, dtype=torch.float32, layout=contiguous)
    return Timing(f"float32 {shaped(LARGE)}", make, 2 * 4 * math.prod(LARGE))


register_cases("$name", run_$name, ${name}_cases, {}, timed=${name}_timing)
'''

TEST = '''"""`$name`: values, every backend against the eager form, refused arguments, torch's opcheck."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import needs
from torch import Tensor

from fastdynat import ops
from fastdynat.ops.checks import ${name}_cases as checks
from fastdynat.verification import Case

CPU = torch.device("cpu")
CASES = [case for case in checks.${name}_cases() if not case.gpu_only]

INTERPRETED = """
import torch
from fastdynat.ops.checks import ${name}_cases as checks

for case in checks.${name}_cases():
    if not case.gpu_only:
        (x,) = case.make(torch.device("cpu"))
        got, expected = (checks.run_$name(x, backend=name) for name in ("triton", "eager"))
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
"""


def assert_same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True, check_stride=True)


def test_values() -> None:
    x = torch.tensor([-1.0, 0.0, 0.25, 1.0, torch.nan])
    assert_same(ops.$name(x, scale=2.0), torch.tensor([0.0, 0.0, 0.5, 1.0, torch.nan]))


@needs("ext")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cpp_equals_eager(case: Case) -> None:
    (x,) = case.make(CPU)
    assert_same(checks.run_$name(x, backend="cpp"), checks.run_$name(x, backend="eager"))


@needs("triton")
def test_triton_equals_eager() -> None:
    # In a process of its own: whether Triton interprets kernels is decided when they are imported.
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"x must be float32 or float64, got torch\\.int64"):
        ops.$name(torch.arange(3), scale=1.0)
    with pytest.raises(ValueError, match="lo must not exceed hi"):
        ops.$name(torch.rand(3), scale=1.0, lo=1.0, hi=0.0)


def test_opcheck() -> None:
    arguments = (torch.rand(2, 3), 0.5, 0.0, 1.0)
    torch.library.opcheck(torch.ops.fastdynat.$name.default, arguments)
'''
