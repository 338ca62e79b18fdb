"""Cost of verification with Triton: few kernels at first use, all of them for `fastdynat doctor --check`."""

import importlib
import json
import os
import subprocess
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, needs
from torch import Tensor

from fastdynat import verification
from fastdynat.commands.doctor import operator_report
from fastdynat.commands.main import main
from fastdynat.ops import _select
from fastdynat.verification import (
    CandidateVerdict,
    Case,
    OperatorCheck,
    judge,
    operator_check,
    speed,
    verdict_store,
)
from fastdynat.verification.isolated_run import Prepared, on_own_thread

CPU = torch.device("cpu")
# Triton kernels: 109 of 254 when this was written. Four of the steps and starts whose sizes a ramp holds on
# the device are programs of their own, which only their own case at first use vouches for.
AT_FIRST, IN_ALL = 109, 250


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No verdicts of this process or an earlier one, no checks but the operators'."""
    import fastdynat.ops.checks  # noqa: F401

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTDYNAT_KERNELS", raising=False)
    monkeypatch.setattr(operator_check, "_registry", dict(operator_check._registry))
    new_process(monkeypatch)


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clear the verdicts in memory, not those on disk."""
    for name in ("_known", "_lost", "_warned"):
        monkeypatch.setattr(judge, name, type(getattr(judge, name))())
    monkeypatch.setattr(speed, "_winners", {})


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Counts by triton_tables.py in its own process: under TRITON_INTERPRET=1 nothing is specialised."""
    env = {
        key: value
        for key, value in os.environ.items()
        if key not in ("TRITON_INTERPRET", "FASTDYNAT_KERNELS")
    }
    env |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    script = ROOT / "tests" / "support" / "triton_tables.py"
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def kernels(launches: list[dict[str, Any]], *, deep: bool) -> dict[str, set[str]]:
    """The kernels of a first use or of a deep check, by operator."""
    found: dict[str, set[str]] = defaultdict(set)
    for line in launches:
        if deep or not line["deep"]:
            found[line["operator"]] |= set(line["kernels"])
    return found


@needs("triton")
def test_a_first_use_compiles_few_kernels(launches: list[dict[str, Any]]) -> None:
    first, every = kernels(launches, deep=False), kernels(launches, deep=True)
    counts = {name: (len(first[name]), len(every[name])) for name in every}
    assert sum(count for count, _ in counts.values()) <= AT_FIRST, counts
    assert sum(count for _, count in counts.values()) >= IN_ALL, counts
    assert counts["attack_logit_grad"][0] <= 20, counts


@needs("triton")
def test_a_first_use_runs_every_kernel_and_the_types_of_training(launches: list[dict[str, Any]]) -> None:
    first, every = kernels(launches, deep=False), kernels(launches, deep=True)
    for name in every:
        functions = [{kernel.split()[0] for kernel in which[name]} for which in (first, every)]
        assert functions[0] == functions[1]
        for kind in ("*fp32", "*bf16"):
            if any(kind in kernel for kernel in every[name]):
                assert any(kind in kernel for kernel in first[name]), f"{name} on {kind}"


@needs("triton")
def test_a_deep_case_is_one_that_compiles(launches: list[dict[str, Any]]) -> None:
    """A case whose kernels are compiled at first use anyway is run there."""
    first = kernels(launches, deep=False)
    idle = [
        f"{line['operator']}: {line['case']}"
        for line in launches
        if line["deep"] and line["kernels"] and set(line["kernels"]) <= first[line["operator"]]
    ]
    assert idle == []


def test_at_first_use_each_loss_is_run_in_the_types_of_training() -> None:
    names = [case.name for case in verification.registered()["attack_logit_grad"].cases() if not case.deep]
    for loss in ("ce", "margin", "dlr", "kl", "soft ce"):
        assert f"{loss}, float32, 33x10" in names
        assert f"{loss}, bfloat16, 33x10, rescaled" in names
        assert f"{loss}, float32, 33x10, rescaled, odd rows" in names
    names = [
        case.name
        for case in verification.registered()["dynamic_label_cross_entropy"].cases()
        if not case.deep
    ]
    for guide in ("float32", "int64"):
        assert f"smoothed, float32, guide {guide}, 33x10" in names
    assert "smoothed, bfloat16, guide bfloat16, 33x10" in names
    assert "soft, float32, guide float32, 33x10" in names


# Faults that only a deep check can see.


def tripled_at_nine(x: Tensor) -> Tensor:
    return 3 * x if len(x) == 9 else 2 * x


def doubling(candidate: Callable[[Tensor], Tensor], *, compiling: bool = True) -> None:
    """The only check there is: of a function that doubles, on 8 numbers, and on 9 in a deep check."""
    cases = [
        Case(f"{size} numbers", lambda device, size=size: (torch.ones(size),), deep=size == 9)
        for size in (8, 9)
    ]
    operator_check._registry.clear()
    names = frozenset({"planted"} if compiling else ())
    verification.register_check(
        OperatorCheck("doubling", {"planted": candidate}, lambda x: 2 * x, lambda: cases, {}, compiling=names)
    )


def test_the_doctor_finds_a_fault_that_a_first_use_leaves_and_it_is_left_out_for_good(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(operator_report, "REGISTER", ())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    doubling(tripled_at_nine)
    assert verification.right("doubling", CPU) == ("planted", "eager")
    new_process(monkeypatch)
    assert verification.right("doubling", CPU) == ("planted", "eager")  # as stored

    assert main(["doctor", "--check", "--json"]) == 1  # which does not take the stored word for it
    row = next(row for row in json.loads(capsys.readouterr().out) if row["implementation"] == "planted")
    assert row["status"] == "wrong"
    assert "9 numbers" in row["detail"]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert verification.right("doubling", CPU) == ("eager",)
    new_process(monkeypatch)
    with pytest.warns(RuntimeWarning, match=r"'planted' is left out: wrong in case '9 numbers'"):
        assert verification.right("doubling", CPU) == ("eager",)
    with pytest.raises(verification.WrongImplementation, match="9 numbers"):
        verification.insist("doubling", "planted", CPU)


def test_what_does_not_compile_at_its_calls_is_checked_deeply_at_first_use() -> None:
    doubling(tripled_at_nine, compiling=False)
    with pytest.warns(RuntimeWarning, match="9 numbers"):
        assert verification.right("doubling", CPU) == ("eager",)


def test_a_first_use_does_not_overwrite_what_a_deep_check_found_meanwhile() -> None:
    wrong = CandidateVerdict(False, "9 numbers", "planted")

    def meanwhile(x: Tensor) -> Tensor:
        key = verdict_store.key_of(verification.registered()["doubling"], CPU)
        assert verdict_store.save_verdicts(verdict_store.Stored(key, {"planted": wrong}))
        return 2 * x

    doubling(meanwhile)
    with pytest.warns(RuntimeWarning, match="9 numbers"):
        assert verification.right("doubling", CPU) == ("eager",)
    assert verdict_store.load_verdicts(
        verdict_store.key_of(verification.registered()["doubling"], CPU)
    ).verdicts == {"planted": wrong}


# A candidate that compiles, beside one that does not.


def beside(monkeypatch: pytest.MonkeyPatch, ready: Callable[[Tensor], Tensor]) -> list[str]:
    """A check of `ready` and of one that compiles; the calls of the second one."""
    calls: list[str] = []

    def compiles(x: Tensor) -> Tensor:
        calls.append(f"{len(x)}")
        return 2 * x

    doubling(compiles)
    check = verification.registered()["doubling"]
    both = {"ready": ready, "compiles": compiles}
    verification.register_check(replace(check, candidates=both, compiling=frozenset({"compiles"})))
    monkeypatch.setattr(operator_report, "REGISTER", ())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return calls


@pytest.mark.filterwarnings("error")
def test_a_first_use_compiles_nothing_where_another_implementation_is_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = beside(monkeypatch, lambda x: 2 * x)
    for _ in range(2):
        assert verification.right("doubling", CPU) == ("ready", "eager")
        assert verification.peek("doubling", CPU) == {
            "ready": verification.RIGHT,
            "compiles": verification.SPARED,
        }
        new_process(monkeypatch)
    assert calls == []
    stored = verdict_store.load_verdicts(verdict_store.key_of(verification.registered()["doubling"], CPU))
    assert stored.verdicts == {"ready": verification.RIGHT}


def test_it_is_checked_where_it_is_asked_for_or_the_others_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = beside(monkeypatch, lambda x: 2 * x)
    assert verification.right("doubling", CPU) == ("ready", "eager")
    verification.insist("doubling", "compiles", CPU)
    assert set(calls) == {"8"}  # without the deep case
    assert verification.right("doubling", CPU) == ("ready", "compiles", "eager")
    new_process(monkeypatch)
    assert verification.right("doubling", CPU) == ("ready", "compiles", "eager")  # as stored

    calls = beside(monkeypatch, lambda x: 3 * x)
    new_process(monkeypatch)
    key = verdict_store.key_of(verification.registered()["doubling"], CPU)
    assert verdict_store.save_verdicts(verdict_store.Stored(key, {}))
    with pytest.warns(RuntimeWarning, match="'ready' is left out"):
        assert verification.right("doubling", CPU) == ("compiles", "eager")
    assert set(calls) == {"8"}


def test_during_a_capture_an_unchecked_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = beside(monkeypatch, lambda x: 2 * x)
    assert verification.right("doubling", CPU) == ("ready", "eager")
    monkeypatch.setattr(_select, "capturing", lambda device: True)
    with pytest.raises(
        verification.WrongImplementation, match="'compiles' has not been checked on this mach"
    ):
        _select._insist("doubling", "compiles", CPU)
    assert calls == []


def test_timings_of_more_implementations_serve_those_of_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    beside(monkeypatch, lambda x: 2 * x)
    raced: list[list[str]] = []

    def race(calls: dict[str, Any], device: torch.device) -> dict[str, float]:
        raced.append(list(calls))
        return {name: 1.0 + place for place, name in enumerate(calls)}

    monkeypatch.setattr(speed, "_race", race)
    names = ("ready", "compiles", "eager")
    for chosen in (names, names[::2], names):
        assert speed.fastest("doubling", CPU, "8", {name: lambda: None for name in chosen}) == "ready"
        monkeypatch.setattr(speed, "_winners", {})
    assert raced == [list(names)]


def test_after_the_doctor_it_takes_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = beside(monkeypatch, lambda x: 2 * x)
    assert verification.right("doubling", CPU) == ("ready", "eager")
    assert main(["doctor", "--check", "--json"]) == 0
    rows = {row["implementation"]: row["status"] for row in json.loads(capsys.readouterr().out)}
    assert rows == {"eager": "reference", "ready": "right", "compiles": "right"}
    assert set(calls) == {"8", "9"}
    assert verification.right("doubling", CPU) == ("ready", "compiles", "eager")
    new_process(monkeypatch)
    assert verification.right("doubling", CPU) == ("ready", "compiles", "eager")


@needs("triton")
@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("attack_logit_grad", "dlr, float32, 5x17"),
        ("dynamic_label_cross_entropy", "weighted sum, float32, guide float32, 5x17"),
    ],
)
def test_a_fault_of_one_specialisation_is_found_in_a_deep_check(
    monkeypatch: pytest.MonkeyPatch, name: str, case: str
) -> None:
    module = importlib.import_module(f"fastdynat.ops.{name}")
    eager = module.IMPLEMENTATIONS["eager"]

    def fault(logits: Tensor, *rest: Any) -> Any:
        first, *others = eager(logits, *rest)
        if logits.shape[1] == 17 and (name != "attack_logit_grad" or rest[1] == module.LOSSES.index("dlr")):
            first = first + 1e-3
        return (first, *others)

    monkeypatch.setitem(module.IMPLEMENTATIONS, "triton", fault)
    prepared = Prepared(verification.registered()[name], CPU)
    assert (
        on_own_thread(lambda: prepared.examine("triton", lambda case: None, deep=False)) == verification.RIGHT
    )
    assert on_own_thread(lambda: prepared.examine("triton", lambda case: None)).case == case
