"""A failed capture leaves no trace in the stream, the generator, the allocator or the collector."""

import gc
import importlib
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cuda_graph_sim import INVALIDATED, SimulatedCuda
from support.fallbacks import CollectedIn, NoFallbacks
from torch import Tensor

from fastdynat.execution.graph_capture import CaptureFailed, CudaRecorder
from fastdynat.execution.graphed_call import WARM_UP_CALLS, GraphedCall


@pytest.fixture(params=["2.11", "2.14"])
def cuda(request: pytest.FixtureRequest) -> Iterator[SimulatedCuda]:
    with SimulatedCuda(request.param) as cuda:
        yield cuda


def noisy(x: Tensor) -> Tensor:
    return x + torch.rand(len(x))


def waits(x: Tensor) -> Tensor:
    y = noisy(x)
    return y if float(y.sum()) > 0 else -y


def forks(then: Callable[[], Any]) -> Callable[[Tensor], Tensor]:
    """Work on a second stream that is never joined, because `then` raises."""
    side: Any = torch.cuda.Stream()

    def fn(x: Tensor) -> Tensor:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            y = noisy(x)
        then()
        torch.cuda.current_stream().wait_stream(side)
        return y

    return fn


def raises(error: BaseException) -> Callable[[], None]:
    def then() -> None:
        if torch.cuda.is_current_stream_capturing():
            raise error

    return then


def as_before(cuda: SimulatedCuda) -> None:
    """Everything that a program does next works."""
    assert cuda.current is cuda.default
    assert cuda.recording == []
    assert not cuda.generator.capturing
    torch.rand(2)
    torch.cuda.empty_cache()
    assert gc.isenabled()


FAULTS: dict[str, tuple[Callable[[], Callable[[Tensor], Tensor]], str]] = {
    "a wait": (lambda: waits, "waits for the device"),
    "out of memory": (
        lambda: forks(raises(torch.OutOfMemoryError("CUDA out of memory.\nTried"))),
        "CUDA out of memory.",
    ),
    "an error of Python's": (lambda: forks(raises(ValueError("no"))), "no"),
    "a message of nothing": (lambda: forks(raises(RuntimeError())), "RuntimeError"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_capture_leaves_nothing_behind(cuda: SimulatedCuda, fault: str) -> None:
    make, why = FAULTS[fault]
    recorder, x = CudaRecorder(torch.device("cpu")), torch.zeros(3)
    outputs, replay = recorder.capture(lambda: noisy(x))  # a graph whose pool lives meanwhile
    fn = make()
    torch.manual_seed(0)
    with pytest.raises(CaptureFailed, match=why) as failed:
        recorder.capture(lambda: fn(x))
    assert "\n" not in str(failed.value)
    assert INVALIDATED not in str(failed.value), "the first error tells more than the last"
    as_before(cuda)
    torch.manual_seed(0)
    got = [(replay(), outputs.clone())[1] for _ in range(2)] + [
        noisy(x)
    ]  # the earlier graph and the generator go on
    torch.manual_seed(0)
    assert torch.equal(torch.stack(got), torch.stack([noisy(x) for _ in range(3)]))
    again, replay_again = recorder.capture(lambda: noisy(x))
    replay_again()
    assert again.max() > 0


@pytest.mark.parametrize("fault", FAULTS)
def test_a_call_goes_on_uncaptured_with_the_same_numbers(cuda: SimulatedCuda, fault: str) -> None:
    make, why = FAULTS[fault]
    fn, said, x = make(), list[str](), torch.ones(3)
    call = GraphedCall(fn, CudaRecorder(torch.device("cpu")), CollectedIn(said))
    torch.manual_seed(1)
    got = [call(x) for _ in range(WARM_UP_CALLS + 3)]
    torch.manual_seed(1)
    want = [fn(x) for _ in range(WARM_UP_CALLS + 3)]
    assert torch.equal(torch.stack(got), torch.stack(want))
    assert len(said) == 1
    assert said[0].startswith("CUDA graphs are off: the capture failed: ")
    assert why in said[0]
    as_before(cuda)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
def test_an_interruption_is_not_taken_for_a_failure(
    cuda: SimulatedCuda, interruption: type[BaseException]
) -> None:
    """Ending the broken capture raises another RuntimeError, which must not replace Ctrl-C."""
    fn = forks(raises(interruption()))
    call = GraphedCall(fn, CudaRecorder(torch.device("cpu")), NoFallbacks())
    for _ in range(WARM_UP_CALLS):
        call(torch.ones(3))
    with pytest.raises(interruption):
        call(torch.ones(3))
    as_before(cuda)


def test_tensors_of_a_failed_capture_and_graphs_given_up_are_freed_at_once(cuda: SimulatedCuda) -> None:
    made: list[weakref.ref[Tensor]] = []

    def fn(x: Tensor) -> Tensor:
        y = x * 2
        made.append(weakref.ref(y))
        return y if len(x) < 5 else waits(y)

    said: list[str] = []
    call = GraphedCall(fn, CudaRecorder(torch.device("cpu")), CollectedIn(said))
    gc.disable()
    try:
        for size in [3] * (WARM_UP_CALLS + 2):
            call(torch.ones(size))
        assert cuda.captures == 1
        for _ in range(WARM_UP_CALLS + 1):
            call(torch.ones(5))
        assert len(said) == 1
        assert sum(ref() is not None for ref in made) == 0
    finally:
        gc.enable()
    torch.cuda.empty_cache()
    assert cuda.pools == {}, "no private pool is left"


def test_a_pool_without_graphs_is_not_used_again(cuda: SimulatedCuda) -> None:
    recorder, x = CudaRecorder(torch.device("cpu")), torch.zeros(3)
    for _ in range(3):
        recorder.capture(lambda: noisy(x))  # dropped at once
    first, second = (recorder.capture(lambda: noisy(x)) for _ in range(2))
    assert max(cuda.pools.values()) == 2, "graphs that live together share one"
    assert first is not second


def test_nothing_else_runs_in_a_capture(cuda: SimulatedCuda) -> None:
    """The collector frees CUDA objects, cuDNN's timings wait: neither is permitted."""
    seen: list[tuple[bool, bool]] = []
    timing = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        for error in (None, ValueError()):

            def fn(error: Exception | None = error) -> Tensor:
                seen.append((gc.isenabled(), torch.backends.cudnn.benchmark))
                if error is not None:
                    raise error
                return torch.zeros(1) + 1

            recorder = CudaRecorder(torch.device("cpu"))
            if error is None:
                recorder.capture(fn)
            else:
                with pytest.raises(CaptureFailed):
                    recorder.capture(fn)
            assert gc.isenabled()
            assert torch.backends.cudnn.benchmark
        assert seen == [(False, False)] * 2
    finally:
        torch.backends.cudnn.benchmark = timing


def test_a_replay_that_fails_is_said_and_the_call_computed_with_the_same_numbers(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    call, x = GraphedCall(noisy, CudaRecorder(torch.device("cpu")), CollectedIn(said)), torch.ones(3)
    torch.manual_seed(2)
    got = [call(x).clone() for _ in range(WARM_UP_CALLS + 1)]

    def out_of_memory(graph: Any) -> None:
        torch.rand(1)  # the generator's offset is moved before the launch
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be")

    monkeypatch.setattr("support.cuda_graph_sim.Graph.replay", out_of_memory)
    got += [call(x) for _ in range(2)]
    torch.manual_seed(2)
    assert torch.equal(torch.stack(got), torch.stack([noisy(x) for _ in range(WARM_UP_CALLS + 3)]))
    assert said == ["CUDA graphs are off: a replay failed: CUDA error: out of memory"]
    as_before(cuda)


def test_an_error_in_the_warm_up_is_the_callers_and_streams_are_in_order(cuda: SimulatedCuda) -> None:
    def fails(x: Tensor) -> Tensor:
        raise ValueError("no")

    call = GraphedCall(fails, CudaRecorder(torch.device("cpu")), NoFallbacks())
    with pytest.raises(ValueError, match="no"):
        call(torch.ones(3))
    as_before(cuda)
    assert cuda.default.waited_for, "what was launched is waited for before its memory is used again"


@pytest.mark.parametrize(("fn", "captured"), [(noisy, True), (waits, False)])
def test_the_benchmark_of_operators_goes_on_after_a_failed_capture(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch, fn: Callable[[Tensor], Tensor], captured: bool
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    bench = importlib.import_module("test_operators")
    monkeypatch.setattr(bench, "DEVICE", "cuda")
    x, runs = torch.ones(3), list[Tensor]()
    run, graph = bench.repeated(lambda: runs.append(fn(x)))
    assert graph is captured
    run()
    assert len({tuple(y.tolist()) for y in runs[-bench.CALLS :]}) == bench.CALLS
    as_before(cuda)
