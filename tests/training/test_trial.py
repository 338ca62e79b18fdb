"""`--compile` for a run: the faster mode by the run's own step, stored, and not timed twice."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdynat.commands.main import main
from fastdynat.config import TrainConfig
from fastdynat.data import dataset_info
from fastdynat.data.random_images import random_split
from fastdynat.methods.configs import default_config, stored_config
from fastdynat.training import trial
from fastdynat.training.resolve import resolve
from fastdynat.training.trial import settle_compile
from fastdynat.tuning import choices

INFO = dataset_info("digits")
assert INFO is not None
SPLIT = random_split(INFO, 8, seed=0, batches=2)
TINY = [
    "--train-size",
    "64",
    "--val-size",
    "20",
    "--batch-size",
    "32",
    "--steps",
    "2",
    "--epochs",
    "1",
    "--method",
    "madry",
]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(choices, "_known", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Any] = torch.compile

    def traced(fn: Any, **kwargs: Any) -> Any:
        return real(
            fn, **{name: value for name, value in kwargs.items() if name != "options"}, backend="eager"
        )

    monkeypatch.setattr(torch, "compile", traced)


def resolved(compile: Any = "auto", **data: Any) -> TrainConfig[Any]:
    asked = default_config("madry")
    engine = replace(asked.engine, device="cpu", amp="off", compile=compile)
    asked = replace(asked, engine=engine, data=replace(asked.data, batch_size=8, loader="resident", **data))
    assert INFO is not None
    return resolve(asked, INFO, announce=False)


def faking(monkeypatch: pytest.MonkeyPatch, off: float, default: float) -> list[str]:
    timed: list[str] = []

    def fake(config: Any, split: Any) -> dict[str, float]:
        timed.append(config.model.model)
        return {"off": off, "default": default}

    monkeypatch.setattr(trial, "_timed", fake)
    return timed


@pytest.mark.parametrize(("off", "default", "mode"), [(1.0, 1.3, "off"), (1.3, 1.0, "default")])
def test_the_faster_one_is_taken_said_and_remembered(
    monkeypatch: pytest.MonkeyPatch, messages: list[str], off: float, default: float, mode: str
) -> None:
    timed = faking(monkeypatch, off, default)
    for _ in range(2):
        assert settle_compile(resolved(), SPLIT).engine.compile == mode
        choices._known.clear()
    assert len(timed) == 1, "the second process reads it"
    assert (
        f"--compile: {mode}; a compiled step is {off / default:.2f}x as fast as one without (measured)"
        in messages
    )


def test_another_setting_is_timed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = faking(monkeypatch, 1.0, 2.0)
    config = resolved()
    settle_compile(config, SPLIT)
    settle_compile(replace(config, data=replace(config.data, batch_size=16)), SPLIT)
    settle_compile(replace(config, model=replace(config.model, model="resnet18")), SPLIT)
    assert timed == ["small", "small", "resnet18"]


@pytest.mark.parametrize("mode", ["off", "default", "max-autotune"])
def test_what_was_decided_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, messages: list[str], mode: str
) -> None:
    timed = faking(monkeypatch, 1.0, 2.0)
    assert settle_compile(resolved(mode), SPLIT).engine.compile == mode
    assert timed == messages == []


def test_without_a_compiler_a_bare_compile_runs_uncompiled_and_says_so(
    monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    monkeypatch.setattr("fastdynat.tuning.devices.shutil.which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    timed = faking(monkeypatch, 2.0, 1.0)
    assert settle_compile(resolved(), SPLIT).engine.compile == "off"
    assert (timed, len(messages)) == ([], 1)
    assert "no C++ compiler" in messages[0]


@pytest.mark.usefixtures("traced_only")
def test_the_trial_times_the_runs_own_step_and_draws_nothing() -> None:
    state = torch.get_rng_state()
    seconds = trial._timed(resolved(), SPLIT)
    assert set(seconds) == {"off", "default"}
    assert all(0 < t < 60 for t in seconds.values())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_run_stores_the_decision_and_resumes_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    timed = faking(monkeypatch, 1.0, 2.0)
    assert (
        main(
            [
                "train",
                "--run-dir",
                str(tmp_path / "run"),
                *TINY,
                "--compile",
                "--amp",
                "off",
                "--stop-after",
                "1",
            ]
        )
        == 0
    )
    assert stored_config(tmp_path / "run").engine.compile == "off"
    monkeypatch.setattr(trial, "_timed", lambda *args: pytest.fail("a resumed run keeps its own"))
    choices._known.clear()
    assert main(["train", "--resume", str(tmp_path / "run"), "--compile"]) == 0
    assert timed == ["small"]
