"""Timings of every operator by pytest-benchmark; `bench/operators.py` runs this file and makes a table of it.

In one group, one after the other: the plain torch form, `torch.compile`'s fusion of it, a copy of the bytes
that an ideal pass moves, and our implementations. A timing counts only if the result was right first: each
implementation is compared with the plain form before it is timed. On a GPU a round is one replay of a CUDA
graph of CALLS calls, so launches are not in it.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case, Thunk, cases
from torch import Tensor

from fastdynat import ops
from fastdynat.execution.graph_capture import CaptureFailed, CudaRecorder
from fastdynat.ops._select import why_unavailable

DEVICE = os.environ.get("FASTDYNAT_BENCH_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
SECONDS = float(
    os.environ.get("FASTDYNAT_BENCH_SECONDS", "1")
)  # of measuring for each implementation of a case, but 5 to 31 rounds
CALLS = 50 if DEVICE == "cuda" else 1
BACKENDS = [
    name
    for name in ops.BACKENDS
    if name != "eager" and why_unavailable(name, DEVICE) is None and (DEVICE == "cuda" or name == "cpp")
]
SELECTED = os.environ.get("FASTDYNAT_BENCH_ONLY", "")
WITHOUT = os.environ.get("FASTDYNAT_BENCH_WITHOUT", "")


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def check(case: Case, thunk: Thunk) -> None:
    for ours, plain in zip(tensors(thunk()), tensors(case.plain(*case.args)), strict=True):
        worst = float((ours.double() - plain.double()).abs().max())
        assert worst <= case.tolerance, (
            f"{case.name}: differs by {worst} from the plain form, so its timing says nothing"
        )


def copy_of(num_bytes: int) -> Thunk:
    source = torch.rand(num_bytes // 8, device=DEVICE)  # half is read, half is written
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def implementation(case: Case, name: str) -> Thunk:
    if name == "copy":
        return copy_of(case.bytes)
    if name == "plain":
        return lambda: case.plain(*case.args)
    if name == "compiled":
        torch._dynamo.reset()
        compiled = torch.compile(case.plain, dynamic=False)
        return lambda: compiled(*case.args)
    return case.operator(name)


def repeated(thunk: Thunk) -> tuple[Callable[[], object], bool]:
    """CALLS calls as one function that returns when they are done, and whether that is one CUDA graph."""
    if DEVICE != "cuda":
        return thunk, False
    recorder = CudaRecorder(torch.device(DEVICE))

    def calls() -> None:
        for _ in range(CALLS):
            thunk()

    for _ in range(3):
        recorder.warm(thunk)
    torch.cuda.synchronize()
    try:
        replay, captured = recorder.capture(calls)[1], True
    except CaptureFailed:  # something in it waits for the device
        replay, captured = calls, False

    def run() -> None:
        replay()
        torch.cuda.synchronize()

    return run, captured


@pytest.mark.parametrize(
    "name", [name for name in ("plain", "compiled", "copy", *BACKENDS) if name != WITHOUT]
)
@pytest.mark.parametrize(
    "case",
    [c for c in cases(DEVICE) if SELECTED in c.name],
    ids=lambda case: f"{case.name} {case.size}".replace(" ", "_"),
)
@pytest.mark.filterwarnings("default")  # torch.compile's advice must not stop a measurement
def test_operator(benchmark: Any, case: Case, name: str) -> None:
    benchmark.group = f"{case.name} @ {case.size}"
    thunk = implementation(case, name)
    if name != "copy":
        check(case, thunk)
    run, captured = repeated(thunk)
    benchmark.extra_info.update(name=name, calls=CALLS, bytes=case.bytes, cuda_graph=captured)
    run()
    begin = time.perf_counter()
    run()
    once = time.perf_counter() - begin
    benchmark.pedantic(run, rounds=max(5, min(31, int(SECONDS / once))), warmup_rounds=1)
