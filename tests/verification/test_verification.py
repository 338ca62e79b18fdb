"""Verification on the machine at hand: planted faults are found, named and left out; nothing else changes."""

import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SIMULATED_CUDA, needs
from torch import Tensor

from fastdynat import ops, verification
from fastdynat.commands.doctor import operator_report
from fastdynat.commands.main import main
from fastdynat.ops import _select, winograd
from fastdynat.ops.pgd_step_linf import IMPLEMENTATIONS
from fastdynat.terminal import progress
from fastdynat.training import resolve_engine
from fastdynat.tuning import Convolution
from fastdynat.verification import Case, OperatorCheck, judge, operator_check, speed, verdict_store
from fastdynat.verification.comparison import difference
from fastdynat.verification.crash_marks import mark
from fastdynat.verification.isolated_run import Prepared, on_own_thread

CPU = torch.device("cpu")
STEP = {"step_size": 2 / 255, "eps": 8 / 255}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No verdicts of this process, nor of an earlier one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTDYNAT_KERNELS", raising=False)
    monkeypatch.setattr(verdict_store, "_said", False)
    new_process(monkeypatch)


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clear the verdicts in memory, not those on disk."""
    for name in ("_known", "_lost", "_warned"):
        monkeypatch.setattr(judge, name, type(getattr(judge, name))())
    monkeypatch.setattr(speed, "_winners", {})


def cached() -> list[Path]:
    """The files of verdicts."""
    folder = verdict_store.user_cache("verified")
    assert folder is not None
    return sorted(folder.glob("*.json"))


def vector(device: torch.device, dtype: torch.dtype, size: int) -> tuple[Tensor]:
    return (torch.arange(size, dtype=dtype, device=device) / 8,)


def double(x: Tensor) -> Tensor:
    return 2 * x


def doubling(candidate: Callable[..., Any], **changes: Any) -> OperatorCheck:
    """A check of a function that doubles, with one candidate."""
    cases = [
        Case(f"{str(dtype)[6:]}, {size}", lambda device, dtype=dtype, size=size: vector(device, dtype, size))
        for dtype in (torch.float32, torch.bfloat16)
        for size in (8, 9, 0)
    ]
    check = OperatorCheck(
        "doubling", {"planted": candidate}, double, lambda: cases, {torch.bfloat16: (2.0**-7, 0)}
    )
    return verification.register_check(replace(check, **changes))


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    import fastdynat.ops.checks  # noqa: F401

    monkeypatch.setattr(operator_check, "_registry", dict(operator_check._registry))


def judged(candidate: Callable[..., Any], **changes: Any) -> verification.CandidateVerdict:
    """The verdict on `candidate`, with the warning that belongs to it."""
    doubling(candidate, **changes)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        right = verification.right("doubling", CPU)
    verdict = verification.verdicts("doubling", CPU)["planted"]
    assert right == (("planted", "eager") if verdict.right else ("eager",))
    texts = [str(w.message) for w in heard]
    if verdict.right:
        assert texts == []
    else:
        assert len(texts) == 1
        assert texts[0].startswith("doubling: implementation 'planted' is left out: ")
        assert verdict.case in texts[0]
        assert verdict.detail in texts[0]
    return verdict


def wrong_in_bfloat16(x: Tensor) -> Tensor:
    return 2 * x if x.dtype == torch.float32 else 2 * x * (1 + 2.0**-6)


def wrong_at_odd_sizes(x: Tensor) -> Tensor:
    return torch.cat([2 * x[: len(x) // 2 * 2], x[len(x) // 2 * 2 :]])


def last_element_missing(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[:-1] = 2 * x[:-1]
    return out


def nan_at_zero(x: Tensor) -> Tensor:
    return 2 * x * (x / x)


def raises(x: Tensor) -> Tensor:
    raise RuntimeError("no kernel image\nis available")


def in_place(x: Tensor) -> Tensor:
    out = 2 * x
    x.add_(1)
    return out


def another_dtype(x: Tensor) -> Tensor:
    return (2 * x).double()


def another_count(x: Tensor) -> tuple[Tensor, Tensor]:
    return 2 * x, x


class Alternating:
    """Right at every other call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return (2 + self.calls % 2 - 1) * x


class OffByOneUlp:
    def __call__(self, x: Tensor) -> Tensor:
        return torch.nextafter(2 * x, torch.full_like(x, 1e9)) if x.dtype == torch.float32 else 2 * x


@pytest.mark.parametrize(
    ("candidate", "case", "detail"),
    [
        (
            wrong_in_bfloat16,
            "bfloat16, 8",
            "7 of 8 bfloat16 values differ, most at [7]: 1.78125, expected 1.75 (off by 0.0312",
        ),
        (
            wrong_at_odd_sizes,
            "float32, 9",
            "1 of 9 float32 values differ, most at [8]: 1.0, expected 2.0 (off by 1, allowed 0)",
        ),
        (last_element_missing, "float32, 8", "1 of 8 float32 values differ, most at [7]: "),
        (nan_at_zero, "float32, 8", "1 of 8 float32 values differ, most at [0]: nan, expected 0.0"),
        (raises, "float32, 8", "failed: RuntimeError: no kernel image"),
        (in_place, "float32, 8", "argument 0 was changed: 8 of 8"),
        (another_dtype, "float32, 8", "dtype float64 instead of float32"),
        (another_count, "float32, 8", "2 outputs instead of 1"),
        (Alternating(), "float32, 8", "another result at call 2: 7 of 8"),
        (OffByOneUlp(), "float32, 8", "8 of 8 float32 values differ"),
        (lambda x: None, "float32, 8", "nothing instead of a tensor"),
        (lambda x: (2 * x)[None], "float32, 8", "shape (1, 8) instead of (8,)"),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__) if callable(value) else "",
)
def test_planted_faults_are_found_and_named(candidate: Callable[..., Any], case: str, detail: str) -> None:
    verdict = judged(candidate)
    assert not verdict.right
    assert verdict.case == case
    assert verdict.detail.startswith(detail)


def test_what_is_within_the_tolerance_is_right() -> None:
    assert judged(double).right
    judge._known.clear()
    for file in cached():
        file.unlink()
    # One step of bfloat16, and the same infinities and NaN.
    assert judged(
        lambda x: 2 * x if x.dtype == torch.float32 else (2 * x.float() * (1 + 2.0**-8)).bfloat16()
    ).right


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_infinities_and_nan_must_be_where_the_reference_has_them(value: float) -> None:
    expected = torch.tensor([2.0, value, 4.0])
    for put in (value, 0.0, 3e38, -3e38, torch.inf, -torch.inf, torch.nan):
        got = torch.tensor([2.5, put, 4.0])
        assert (difference(got, expected, {torch.float32: (0.5, 10.0)}) == "") == (str(put) == str(value))


# Operators.


def planted(monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Any], name: str = "cpp") -> None:
    """Implementation `name` of pgd_step_linf is the eager one with a fault."""
    monkeypatch.setitem(IMPLEMENTATIONS, name, fault)


def eager_step(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return IMPLEMENTATIONS["eager"](*args)  # type: ignore[no-any-return]


def wrong_when_half(x_adv: Tensor, grad: Tensor, *rest: Any) -> Any:
    x, low, moved = eager_step(x_adv, grad, *rest)
    return (x + 1e-3 if grad.dtype == torch.float16 else x), low, moved


def wrong_when_odd(x_adv: Tensor, *rest: Any) -> Any:
    x, low, moved = eager_step(x_adv, *rest)
    if x.numel() % 4:
        x.view(-1)[-1] += 1e-3
    return x, low, moved


def wrong_strides(x_adv: Tensor, *rest: Any) -> Any:
    x, low, moved = eager_step(x_adv, *rest)
    return (x.contiguous() if x.dim() == 4 else x), low, moved


def nan_where_zero(x_adv: Tensor, grad: Tensor, *rest: Any) -> Any:
    x, low, moved = eager_step(x_adv, grad, *rest)
    return torch.where(grad == 0, torch.nan, x), low, moved


def no_kernel(*args: Any) -> Any:
    raise RuntimeError("CUDA error: invalid configuration argument")


FAULTS = [wrong_when_half, wrong_when_odd, wrong_strides, nan_where_zero, no_kernel]


def step() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(4, 3, 7, 9, generator=generator)
    return ops.pgd_step_linf(x0, torch.randn(x0.shape, generator=generator), x0, **STEP)


@needs("ext")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_operator_is_left_out_and_the_others_stay(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Any]
) -> None:
    with ops.use_backend("eager"):
        expected = step()
    planted(monkeypatch, fault)
    with pytest.warns(
        RuntimeWarning, match="pgd_step_linf: implementation 'cpp' is left out: wrong in case"
    ) as heard:
        found = step()
    assert len(heard) == 1
    assert torch.equal(found, expected)
    assert torch.equal(step(), expected)  # and no second warning
    assert ops.operators_in_use(CPU) == "cpp, but eager for pgd_step_linf"
    assert ops.selected_backend("cpu") == "cpp"
    x = torch.rand(2, 3, 4, 4)
    ops.random_start(x, torch.tensor([1, 2]), kind="uniform", scale=0.1)
    assert verification.peek("random_start", CPU) == {"cpp": verification.RIGHT}


@needs("ext")
def test_who_insists_is_refused_and_who_names_it_in_the_call_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, wrong_when_odd)
    message = "pgd_step_linf: implementation 'cpp' was asked for but is wrong in case .*off by 0.001"
    with (
        pytest.warns(RuntimeWarning),
        ops.use_backend("cpp"),
        pytest.raises(verification.WrongImplementation, match=message),
    ):
        step()
    monkeypatch.setenv("FASTDYNAT_KERNELS", "cpp")
    with pytest.raises(verification.WrongImplementation, match=message):
        step()
    with pytest.raises(verification.WrongImplementation, match=message):
        ops.prepare(CPU)
    x = torch.rand(5)
    ops.pgd_step_linf(x, x, x, **STEP, backend="cpp")
    monkeypatch.delenv("FASTDYNAT_KERNELS")
    ops.prepare(CPU)  # says nothing more


def test_every_operator_has_a_table_and_every_table_an_operator() -> None:
    own = {
        name for name in verification.registered() if name != "doubling" and not name.startswith("conv_relu_")
    }  # cuDNN's
    assert set(_select.OPERATORS) == own
    assert len(_select.OPERATORS) == 13


@needs("ext")
@pytest.mark.parametrize("name", _select.OPERATORS)
def test_the_operators_are_right(name: str) -> None:
    assert verification.right(name, CPU) == ("cpp", "eager")
    cases = [case.name for case in verification.registered()[name].cases()]
    assert len(cases) == len(set(cases))


# State that a check leaves unchanged.


def state() -> list[Any]:
    flags = torch.backends.cudnn
    return [
        torch.get_rng_state().tolist(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        (flags.benchmark, flags.deterministic, flags.allow_tf32, flags.enabled),
        torch.is_autocast_enabled("cpu"),
        torch.empty(0).device,
        threading.active_count(),
    ]


@needs("ext")
@pytest.mark.parametrize(
    "mode", ["plain", "float64", "inference", "no_grad", "autocast", "meta", "deterministic"]
)
def test_the_caller_is_not_disturbed(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    contexts: dict[str, Any] = {
        "inference": torch.inference_mode(),
        "no_grad": torch.no_grad(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
        "meta": torch.device("meta"),
    }
    planted(monkeypatch, wrong_when_odd)
    torch.rand(3)
    if mode == "float64":
        monkeypatch.setattr(torch, "get_default_dtype", torch.get_default_dtype)
        torch.set_default_dtype(torch.float64)
    if mode == "deterministic":
        torch.use_deterministic_algorithms(True)
    try:
        with contexts.get(mode, torch.enable_grad()):
            before = state()
            with pytest.warns(RuntimeWarning, match="pgd_step_linf"):
                ops.prepare(CPU)
            assert state() == before
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
    wrong = [name for name in _select.OPERATORS if not verification.verdicts(name, CPU)["cpp"].right]
    assert wrong == ["pgd_step_linf"]


TABLES = {
    name: importlib.import_module(f"fastdynat.ops.{name}").IMPLEMENTATIONS
    for name in _select.OPERATORS
    if not name.startswith("winograd")
} | {winograd.CONV: winograd.CONV_IMPLEMENTATIONS, winograd.WEIGHTS: winograd.WEIGHTS_IMPLEMENTATIONS}
TINY = [
    "--train-size",
    "40",
    "--val-size",
    "20",
    "--batch-size",
    "20",
    "--steps",
    "2",
    "--epochs",
    "2",
    "--quiet",
]


# With a first layer for `image_conv_grad` and one for Winograd's algorithm.
NET = """
from torch import nn


def make_net(num_classes):
    convolutions = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, num_classes))
"""


def trained(folder: Path, *flags: str) -> tuple[bytes, list[Any]]:
    """The weights of a run and the state of the process after it."""
    torch.manual_seed(3)
    (net := folder.with_name("net.py")).write_text(NET)
    assert main(["train", "--run-dir", str(folder), "--model", f"{net}:make_net", *TINY, *flags]) == 0
    return (folder / "last" / "model.safetensors").read_bytes(), state()


@needs("ext")
def test_a_run_with_wrong_kernels_is_the_run_on_eager_to_the_last_bit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Wherever this runs, and on images of any size, nothing else speaks against Winograd's algorithm.
    monkeypatch.setattr(resolve_engine, "winograd_pays", lambda *args, **options: True)
    monkeypatch.setattr(Convolution, "repays", lambda *args: True)
    monkeypatch.setattr(Convolution, "gain", lambda *args: 1.0)
    eager = trained(tmp_path / "eager", "--kernels", "eager")
    for table in TABLES.values():
        monkeypatch.setitem(table, "cpp", no_kernel)
    new_process(monkeypatch)
    with pytest.warns(RuntimeWarning) as heard:
        found = trained(tmp_path / "wrong")
    assert {str(w.message).partition(":")[0] for w in heard} == set(TABLES)
    assert len(heard) == len(TABLES)
    assert found == eager
    starts = json.loads((tmp_path / "wrong" / "environment.json").read_text())
    assert starts[0]["operators"].startswith("cpp, but eager for ")
    # Refused before any work, and the state is that of never having tried.
    with pytest.warns(RuntimeWarning) if not judge._warned else warnings.catch_warnings():
        assert main(["train", "--run-dir", str(tmp_path / "insisted"), *TINY, "--kernels", "cpp"]) == 2
    assert not (tmp_path / "insisted").exists()


def test_no_check_at_import() -> None:
    code = """
import sys, fastdynat.ops, fastdynat.attacks, fastdynat.evaluation
from fastdynat.verification import judge
assert not judge._known and "fastdynat.ops.checks" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# The verdict_store.


@needs("ext")
def test_the_next_process_does_not_check_again(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, wrong_when_odd)
    with pytest.warns(RuntimeWarning):
        step()
    assert len(cached()) == 1
    stored = json.loads(cached()[0].read_text())
    assert stored["verdicts"]["cpp"]["right"] is False
    new_process(monkeypatch)
    monkeypatch.setattr(judge, "_examine", lambda *args, **options: pytest.fail("checked again"))
    with pytest.warns(RuntimeWarning, match="'cpp' is left out"):  # every process says so
        step()
    assert cached()[0].with_suffix(".checking").exists() is False


@needs("ext")
@pytest.mark.parametrize("change", ["fastdynat", "torch", "triton", "processor", "sources"])
def test_another_version_or_processor_is_checked_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: str
) -> None:
    step()
    new_process(monkeypatch)
    if change == "processor":
        monkeypatch.setattr(verdict_store, "processor", lambda device: {"model": "another"})
    elif change == "sources":
        source = tmp_path / "kernel.cpp"
        source.write_text("a kernel")
        found = verification.registered()["pgd_step_linf"]
        verification.register_check(replace(found, sources=(*found.sources, source)))
    else:
        now = verdict_store.versions(CPU)
        monkeypatch.setattr(verdict_store, "versions", lambda device: now | {change: "9.9"})
    step()
    assert len(cached()) == 2
    new_process(monkeypatch)
    step()
    assert len(cached()) == 2


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\xff\xfe\x00",
        b"{",
        b"[]",
        b'{"format": "fastdynat-verified/1", "key": 3, "verdicts": {}}',
        b'{"format": "fastdynat-verified/2"}',
        b"[" * 100_000,
        b'{"format": "fastdynat-verified/1", "key": {}, "verdicts": {"planted": {"right": "yes"}}}',
        b"\0" * 1_000_000,
    ],
    ids=range(9),
)
def test_a_damaged_file_is_made_anew(monkeypatch: pytest.MonkeyPatch, damage: bytes) -> None:
    doubling(raises)
    with pytest.warns(RuntimeWarning):
        verification.right("doubling", CPU)
    (file,) = cached()
    whole = file.read_bytes()
    file.write_bytes(damage)
    new_process(monkeypatch)
    with pytest.warns(RuntimeWarning):
        verification.right("doubling", CPU)
    assert file.read_bytes() == whole


def test_a_folder_in_the_place_of_the_file(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    doubling(double)
    assert verification.right("doubling", CPU) == ("planted", "eager")
    (file,) = cached()
    file.unlink()
    file.mkdir()
    new_process(monkeypatch)
    assert verification.right("doubling", CPU) == ("planted", "eager")
    assert "cannot be kept" in caplog.text


def test_an_unwritable_cache_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    step()
    ops.random_start(torch.rand(2, 3), torch.tensor([1, 2]), kind="uniform", scale=0.1)
    said = [record.getMessage() for record in caplog.records]
    if ops.available_backends()["cpp"] is None:
        assert len(said) == 1
        assert said[0].startswith(
            "operators are checked anew at every start: verdicts cannot be kept in /proc/nowhere"
        )


CRASH = """
import signal, torch
from fastdynat import verification
def crash(x):
    if len(x) == 9:
        signal.raise_signal(signal.SIGSEGV)  # to this thread, which does not go on meanwhile
    return 2 * x
def numbers(n):
    def values(device):
        return (torch.arange(n, dtype=torch.float32, device=device),)
    return verification.Case(f"{n} numbers", values)
cases = [numbers(8), numbers(9)]
candidates = {"crash": crash, "good": lambda x: x + x}
check = verification.OperatorCheck("doubling", candidates, lambda x: 2 * x, lambda: cases, {})
verification.register_check(check)
print(verification.right("doubling", torch.device("cpu")))
"""


def run(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **options
    )


CUT_OFF = CRASH.replace("signal.SIGSEGV", "signal.SIGKILL")


def test_what_crashes_the_process_is_not_tried_again() -> None:
    assert run(CRASH).returncode == -signal.SIGSEGV
    again = run(CRASH)
    assert again.stdout == "('good', 'eager')\n", again.stderr
    assert (
        "'crash' is left out: wrong in case '9 numbers': the process that checked it crashed there"
        in again.stderr
    )
    assert "(Segmentation fault)" in again.stderr
    third = run(CRASH)
    assert third.stdout == "('good', 'eager')\n", third.stderr


def test_a_check_that_was_cut_off_says_nothing_until_it_happens_twice() -> None:
    """kill -9 and a lack of memory meet good implementations as well."""
    assert run(CUT_OFF).returncode == -signal.SIGKILL
    harmless = CRASH.replace("len(x) == 9", "False")
    assert run(harmless).stdout == "('crash', 'good', 'eager')\n"
    for path in cached():
        path.unlink()
    assert [run(CUT_OFF).returncode for _ in range(2)] == [-signal.SIGKILL] * 2
    third = run(CUT_OFF)
    assert third.stdout == "('good', 'eager')\n", third.stderr
    assert "wrong in case '9 numbers': two processes that checked it ended there" in third.stderr


def test_a_mark_of_an_earlier_version_and_one_of_rubbish(tmp_path: Path) -> None:
    key = verdict_store.key_of(doubling(double), CPU)
    path = verdict_store.path_of(key)
    assert path is not None
    path.parent.mkdir(parents=True)
    for text, ends in (
        ("float32, 8", 1),
        ("float32, 8\n1\n", 2),
        ("float32, 8\nx\xb2\n", 1),
        ("\0\n\n", 1),
        ("", 0),
    ):
        path.with_name(f"{path.stem}-planted.checking").write_text(text, encoding="utf-8")
        with mark(key, "planted") as (left, _):
            assert left.ends == ends
        assert not list(path.parent.iterdir())


def test_faulthandler_is_left_as_it_was() -> None:
    key, before = verdict_store.key_of(doubling(double), CPU), faulthandler.is_enabled()
    with mark(key, "planted"):
        assert faulthandler.is_enabled()
    assert faulthandler.is_enabled() == before


def test_a_check_that_another_process_runs_is_no_crash() -> None:
    check = doubling(double)
    with mark(verdict_store.key_of(check, CPU), "planted") as (left, note):
        assert not str(left)
        note("float32, 8")
        code = f"""
from fastdynat.verification.crash_marks import mark
with mark({verdict_store.key_of(check, CPU)!r}, "planted") as (left, note):
    print(left.ends)
"""
        assert run(code).stdout == "0\n"
    with mark(verdict_store.key_of(check, CPU), "planted") as (left, note):
        assert left.ends == 0


def test_a_broken_cuda_context_is_remembered_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdynat.verification import isolated_run as examine

    doubling(raises, candidates={"cuda": raises, "triton": double})
    monkeypatch.setattr(examine, "lost", lambda device: True)
    message = r"implementation 'cuda' broke the CUDA context \(float32, 8: .*start again"
    for _ in range(2):
        with pytest.raises(verification.DeviceLost, match=message):
            verification.right("doubling", CPU)
    new_process(monkeypatch)
    monkeypatch.setattr(examine, "lost", lambda device: False)
    with pytest.warns(RuntimeWarning, match="'cuda' is left out"):
        assert verification.right("doubling", CPU) == ("triton", "eager")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 EiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] data. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
        OSError(28, "No space left on device"),
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
    ],
    ids=lambda error: f"{type(error).__name__} {error}"[:40],
)
def test_what_says_nothing_of_a_candidate_is_no_verdict(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """It is left out now, other verdicts are kept, and the next process checks it again."""

    def hungry(x: Tensor) -> Tensor:
        raise error

    doubling(hungry, candidates={"hungry": hungry, "good": lambda x: x + x, "bad": torch.neg})
    with pytest.warns(RuntimeWarning) as warned:
        assert verification.right("doubling", CPU) == ("good", "eager")
    said = [str(w.message) for w in warned]
    assert len(said) == 2
    assert any(
        "'hungry' is left out: wrong in case 'float32, 8': cannot be checked now: " in text for text in said
    )
    new_process(monkeypatch)
    doubling(double, candidates={"hungry": double, "good": raises, "bad": raises})
    with pytest.warns(RuntimeWarning, match="'bad' is left out"):
        assert verification.right("doubling", CPU) == ("hungry", "good", "eager")


def test_a_candidate_that_writes_to_its_arguments_harms_no_other() -> None:
    doubling(double, candidates={"first": in_place, "second": double})
    with pytest.warns(RuntimeWarning, match="'first' is left out"):
        assert verification.right("doubling", CPU) == ("second", "eager")


# Threads, forks, compilers.


def test_threads_share_one_check() -> None:
    calls = []

    def counted(x: Tensor) -> Tensor:
        calls.append(len(x))
        return 2 * x

    doubling(counted)
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(verification.right("doubling", CPU))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [("planted", "eager")] * 8
    assert len(calls) == 2 * 6


def test_a_fork_while_another_thread_checks() -> None:
    started, go_on = threading.Event(), threading.Event()

    def waits(x: Tensor) -> Tensor:
        started.set()
        go_on.wait(30)
        return 2 * x

    doubling(waits)
    thread = threading.Thread(target=lambda: verification.right("doubling", CPU))
    thread.start()
    started.wait(30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        go_on.set()
        try:
            os._exit(0 if verification.right("doubling", CPU) == ("planted", "eager") else 1)
        finally:
            os._exit(2)
    _, status = os.waitpid(child, 0)
    go_on.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0


def test_errors_go_on_in_the_callers_thread() -> None:
    def fails() -> None:
        raise KeyError("here")

    with pytest.raises(KeyError, match="here"):
        on_own_thread(fails)


@needs("ext")
def test_nothing_runs_while_torch_compile_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    def both(x: Tensor) -> Tensor:
        return ops.pgd_step_linf(x, x, x, **STEP)

    x = torch.rand(5)
    monkeypatch.setattr(judge, "_examine", lambda *args, **options: pytest.fail("checked while tracing"))
    ran = []
    monkeypatch.setitem(IMPLEMENTATIONS, "cpp", lambda *args: ran.append("cpp") or eager_step(*args))
    compiled = torch.compile(both, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        compiled(x), both.__wrapped__(x) if hasattr(both, "__wrapped__") else compiled(x)
    )
    assert judge._known == {}


# fastdynat doctor --check


@needs("ext")
def test_the_doctor_checks_afresh(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(operator_report, "SECONDS", 0.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in [name for name in verification.registered() if name not in ("pgd_step_linf", "soft_margin")]:
        del operator_check._registry[name]
    right = IMPLEMENTATIONS["cpp"]
    planted(monkeypatch, wrong_when_half)
    assert main(["doctor", "--check", "--json"]) == 1
    rows = {(row["operator"], row["implementation"]): row for row in json.loads(capsys.readouterr().out)}
    wrong = rows["pgd_step_linf", "cpp"]
    assert wrong["status"] == "wrong"
    assert "float16" in wrong["detail"]
    assert "off by 0.001" in wrong["detail"]
    assert wrong["milliseconds"] is None
    assert rows["soft_margin", "cpp"]["status"] == "right"
    for name in ("cpp", "eager"):
        assert rows["soft_margin", name]["milliseconds"] > 0
        assert rows["soft_margin", name]["share"] is None
    assert rows["soft_margin", "cuda"]["status"] == "missing"
    assert rows["soft_margin", "cuda"]["detail"]
    assert main(["doctor", "--check"]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "Wrong and left out: pgd_step_linf (cpp, cpu)." in text
    # Mended, it is found right again, and used again.
    monkeypatch.setitem(IMPLEMENTATIONS, "cpp", right)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    assert main(["doctor", "--check"]) == 0
    shown = capsys.readouterr()
    assert "All 2 implementations are right." in shown.out
    assert "1 of 2 operators" in shown.err  # where no terminal shows bars
    assert verification.right("pgd_step_linf", CPU) == ("cpp", "eager")


def wrong_when_large(x_adv: Tensor, *rest: Any) -> Any:
    x, low, moved = eager_step(x_adv, *rest)
    if x.numel() > 1 << 17:
        x.view(-1)[1 << 17] += 1e-3
    return x, low, moved


@needs("ext")
def test_what_is_wrong_at_the_sizes_of_training_only_is_found_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check = verification.registered()["pgd_step_linf"]
    found = {}
    for name, fault in (("right", IMPLEMENTATIONS["cpp"]), ("wrong", wrong_when_large)):
        planted(monkeypatch, fault)
        small, full = Prepared(check, CPU), Prepared(check, CPU, full_size=True)
        found[name] = [
            on_own_thread(lambda: prepared.examine("cpp", lambda case: None))  # noqa: B023 - called at once
            for prepared in (small, full)
        ]
    assert found["right"] == [verification.RIGHT, verification.RIGHT]
    assert found["wrong"][0] == verification.RIGHT
    assert "256x3x32x32" in found["wrong"][1].case
    assert "off by 0.001" in found["wrong"][1].detail


@needs("ext")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["augment", "pgd_step_l0", "pgd_step_l1", "pgd_step_l2", "random_start"])
def test_right_implementations_pass_at_full_size(name: str) -> None:
    prepared = Prepared(verification.registered()[name], CPU, full_size=True)
    assert any(case.gpu_only for case, *_ in prepared.calls)
    assert on_own_thread(lambda: prepared.examine("cpp", lambda case: None)) == verification.RIGHT


# The tables, on what stands for a GPU here.

QUICK = ("augment", "pgd_step_linf", "pgd_step_l2", "random_start", "soft_margin")  # in the simulator
ON_GPUS = [name for name in _select.OPERATORS if not name.startswith("winograd")]
PAIRS = [pytest.param(name, *SIMULATED_CUDA.values, marks=SIMULATED_CUDA.marks) for name in QUICK]
SLOW = [
    pytest.param(name, *SIMULATED_CUDA.values, marks=SIMULATED_CUDA.marks)
    for name in ON_GPUS
    if name not in QUICK
]
SLOW += [pytest.param(name, "triton", marks=needs("triton")) for name in ON_GPUS]
PAIRS += [pytest.param(*pair.values, marks=[*pair.marks, pytest.mark.slow]) for pair in SLOW]


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow|All-NaN):RuntimeWarning")
@pytest.mark.parametrize(("name", "candidate"), PAIRS)
def test_the_kernels_of_gpus_pass_the_tables(name: str, candidate: str) -> None:
    prepared = Prepared(verification.registered()[name], CPU)
    # Triton's interpreter cuts off the bits that a GPU rounds to bfloat16.
    prepared.calls = [
        call for call in prepared.calls if candidate != "triton" or "bfloat16" not in call[0].name
    ]
    assert on_own_thread(lambda: prepared.examine(candidate, lambda case: None)) == verification.RIGHT
