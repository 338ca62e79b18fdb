"""The fastest of the right implementations by size: measured once, remembered, never on a close call."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import needs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastdynat.ops.checks  # noqa: F401 - registers
from fastdynat import machine, ops, verification
from fastdynat.execution.graph_capture import CaptureFailed
from fastdynat.machine import gpu_racing
from fastdynat.ops.dynamic_label_cross_entropy import IMPLEMENTATIONS as LOSS
from fastdynat.ops.pgd_step_linf import IMPLEMENTATIONS as STEP
from fastdynat.verification import captured_calls, judge, speed, verdict_store

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTDYNAT_KERNELS", raising=False)
    new_process(monkeypatch)


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "_known", {})
    monkeypatch.setattr(speed, "_winners", {})


class Counted:
    """An implementation that can be made slow, and counts its calls."""

    def __init__(self, run: Any) -> None:
        self.run, self.calls, self.seconds = run, 0, 0.0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        if self.seconds:
            time.sleep(self.seconds)
        return self.run(*args)


def step(rows: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(rows, 3, 7, 9, generator=generator)
    return ops.pgd_step_linf(
        x0, torch.randn(x0.shape, generator=generator), x0, step_size=2 / 255, eps=8 / 255
    )


@pytest.fixture
def cpp(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """The native implementation of pgd_step_linf."""
    counted = Counted(STEP["cpp"])
    monkeypatch.setitem(STEP, "cpp", counted)
    return counted


@needs("ext")
def test_one_that_is_right_but_slow_is_not_taken(cpp: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verification.right("pgd_step_linf", CPU) == ("cpp", "eager")
    cpp.seconds = 0.03
    with ops.use_backend("eager"):
        expected = step()
    assert torch.equal(step(), expected)
    before = cpp.calls
    assert torch.equal(step(), expected)
    assert cpp.calls == before
    assert speed._winners == {("pgd_step_linf", CPU, "float32 3 10"): "eager"}
    # Another size is another question, and the next process has the answers.
    cpp.seconds = 0
    step(64)
    assert verification.winner("pgd_step_linf", CPU, "float32 7 14") == "cpp"
    new_process(monkeypatch)
    monkeypatch.setattr(speed, "_race", lambda *args: pytest.fail("measured again"))
    step(), step(64)
    assert sorted(speed._winners.values()) == ["cpp", "eager"]


@needs("ext")
def test_the_preferred_one_is_timed_a_few_times_only(cpp: Counted) -> None:
    step()
    assert verification.winner("pgd_step_linf", CPU, "float32 3 10") == "cpp"
    before = cpp.calls
    step()
    assert cpp.calls == before + 1


@needs("ext")
def test_nothing_is_measured_where_it_would_not_be_remembered_or_must_not_matter(
    cpp: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpp.seconds = 0.001
    monkeypatch.setattr(speed, "_race", lambda *args: pytest.fail("measured"))
    torch.use_deterministic_algorithms(True)
    try:
        step()
    finally:
        torch.use_deterministic_algorithms(False)
    assert speed._winners == {}
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    step()
    assert set(speed._winners.values()) == {"cpp"}
    ops.pgd_step_linf(*(torch.rand(0, 3) for _ in range(3)), step_size=0.1, eps=0.1)
    assert len(speed._winners) == 1


@pytest.mark.parametrize(
    ("seconds", "device", "name"),
    [
        ({"cpp": 1.0, "eager": 0.6}, "cpu", "cpp"),  # no close call, so that machines of a kind agree
        ({"cpp": 1.0, "eager": 0.4}, "cpu", "eager"),
        ({"cuda": 1.0, "triton": 0.95, "eager": 3.0}, "cuda", "cuda"),
        ({"cuda": 1.0, "triton": 0.8, "eager": 3.0}, "cuda", "triton"),
        ({"cuda": float("inf"), "triton": 2.0, "eager": 1.0}, "cuda", "eager"),
        ({"cuda": float("inf"), "eager": float("inf")}, "cuda", "cuda"),
    ],
)
def test_the_preferred_one_wins_unless_another_is_clearly_faster(
    seconds: dict[str, float], device: str, name: str
) -> None:
    assert speed.best(seconds, torch.device(device)) == name


def test_an_upset_has_to_happen_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([{"cpp": 9.0, "eager": 1.0}, {"cpp": 1.0, "eager": 2.0}])
    asked = []

    def timed(calls: Any, device: Any, seconds: float) -> dict[str, float]:
        asked.append(seconds)
        return next(times)

    monkeypatch.setattr(speed, "timed", timed)
    assert (
        verification.fastest("pgd_step_linf", CPU, "a size", {"cpp": lambda: None, "eager": lambda: None})
        == "cpp"
    )
    assert asked == [speed.SECONDS, speed.AGAIN]
    (file,) = (verdict_store.user_cache("verified") or Path()).glob("*.json")
    assert json.loads(file.read_text())["fastest"] == {"a size": {"cpp": 1.0, "eager": 2.0}}


def test_one_that_fails_at_this_size_is_out_of_the_race(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert (
        verification.fastest(
            "pgd_step_linf", CPU, "large", {"cpp": lambda: time.sleep(0.001), "eager": no_memory}
        )
        == "cpp"
    )


@needs("ext")
def test_the_backward_pass_is_timed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    verification.right("dynamic_label_cross_entropy", CPU)
    gradients: list[Tensor] = []
    z = torch.randn(33, 10, requires_grad=True)
    expected = torch.autograd.grad(ops.dynamic_label_cross_entropy(z, z.detach(), backend="cpp").loss, z)[0]
    eager = LOSS["eager"]
    monkeypatch.setitem(LOSS, "eager", lambda *args: _hooked(eager, args, gradients))
    loss = ops.dynamic_label_cross_entropy(z, z.detach()).loss
    assert z.grad is None
    (found,) = torch.autograd.grad(loss, z)
    assert torch.equal(found, expected)
    assert gradients


def _hooked(run: Any, args: Any, gradients: list[Tensor]) -> Any:
    outputs = run(*args)
    if outputs[0].requires_grad:
        outputs[0].register_hook(lambda grad: gradients.append(grad))
    return outputs


def test_the_callers_mistakes_are_raised_as_ever() -> None:
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="index 5 is outside"):
            ops.augment(images, torch.tensor([5]))
    assert speed._winners == {}


class Clock:
    """A GPU whose time the calls advance."""

    now = 0.0

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object) -> None:
            self.at = Clock.now

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: "Clock.Event") -> float:
            return 1000 * (end.at - self.at)


def test_a_race_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        L2_cache_size = 1 << 20

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "Event", Clock.Event)
    count = {"fast": 0, "slow": 0}

    def call(name: str, seconds: float) -> None:
        count[name] += 1
        Clock.now += seconds if count[name] > gpu_racing.WARM_UP else 100.0  # the first calls compile
        Clock.now += 50.0 if count[name] == 5 else 0.0  # an outlier

    found = machine.race_on_gpu(
        {"fast": lambda: call("fast", 1.0), "slow": lambda: call("slow", 2.0)}, CPU, seconds=0.0
    )
    assert found == pytest.approx({"fast": 1.0, "slow": 2.0})
    assert count == {
        "fast": gpu_racing.WARM_UP + gpu_racing.MIN_ROUNDS,
        "slow": gpu_racing.WARM_UP + gpu_racing.MIN_ROUNDS,
    }


class VirtualGPU(TorchDispatchMode):
    """A host that launches work, and a GPU that does it in order, each with its own time in microseconds.

    The work of this process is the overwriting of the cache; calls say themselves what they cost. It stands
    for a recorder of CUDA graphs, too, whose replays take the host 8 us.
    """

    def __init__(self, *, captures: bool) -> None:
        super().__init__()
        self.host = self.gpu = 0.0
        self.captures, self._recorded = captures, list[float]()
        self._capturing = False

    def launch(self, host: float, gpu: float) -> None:
        if self._capturing:
            self._recorded.append(gpu)
            return
        self.host += host
        self.gpu = max(self.gpu, self.host) + gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.zero_.default:
            self.launch(5.0, 30.0)
        return func(*args, **(kwargs or {}))

    def warm(self, fn: Callable[[], Any]) -> Any:
        return fn()

    def capture(self, fn: Callable[[], Any]) -> tuple[None, Callable[[], None]]:
        if not self.captures:
            raise CaptureFailed("it waits for the device")
        self._recorded, self._capturing = [], True
        fn()
        self._capturing = False
        kernels = sum(self._recorded)
        return None, lambda: self.launch(8.0, kernels)

    def event(self, enable_timing: bool) -> Any:
        made = SimpleNamespace(at=0.0)

        def record(stream: object) -> None:
            made.at = max(self.gpu, self.host)

        def synchronize() -> None:
            self.host = max(self.host, made.at)

        made.record, made.synchronize = record, synchronize
        made.elapsed_time = lambda end: (end.at - made.at) / 1000
        return made


@pytest.mark.parametrize("captures", [True, False], ids=["captured", "not capturable"])
def test_a_race_on_a_gpu_is_won_by_the_least_work_of_the_gpu(
    captures: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fused call takes the host longer than overwriting the cache takes the GPU, and the GPU less work."""
    gpu = VirtualGPU(captures=captures)
    clock = SimpleNamespace(perf_counter=lambda: gpu.host / 1e6)
    monkeypatch.setattr(gpu_racing, "time", clock)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1))
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(captured_calls, "CudaRecorder", lambda device: gpu)
    monkeypatch.setattr(speed, "race_on_gpu", lambda calls, device, seconds: machine.race_on_gpu(calls, CPU))
    with gpu:
        found = speed.timed(
            {"fused": lambda: gpu.launch(60.0, 20.0), "apart": lambda: gpu.launch(15.0, 25.0)},
            torch.device("cuda:0"),
            0.2,
        )
    assert found == pytest.approx({"fused": 20e-6, "apart": 25e-6})
