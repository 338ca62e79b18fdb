"""Exactness of resuming: what is promised, where it is printed, and the effect of `--deterministic`."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fallbacks import NoFallbacks

from fastdynat.commands.main import main
from fastdynat.config import EngineConfig
from fastdynat.execution.compiling import compile_whole
from fastdynat.runs.environment import read_starts
from fastdynat.training import start
from fastdynat.training.arithmetic import arithmetic, rounding_of_resume
from fastdynat.training.rng import seed_everything

TINY = [
    "--method",
    "natural",
    "--train-size",
    "96",
    "--val-size",
    "20",
    "--batch-size",
    "32",
    "--epochs",
    "2",
    "--quiet",
]


@pytest.mark.parametrize(
    ("device", "deterministic", "exact"),
    [("cpu", False, True), ("cpu", True, True), ("cuda", True, True), ("cuda", False, False)],
)
def test_on_a_gpu_only_the_deterministic_run_resumes_exactly(
    device: str, deterministic: bool, exact: bool
) -> None:
    why = rounding_of_resume(EngineConfig(device=device, deterministic=deterministic))
    assert (why is None) == exact
    assert exact or "--deterministic" in str(why)


def test_a_run_and_its_resume_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastdynat.training import resume

    for module in (start, resume):
        monkeypatch.setattr(
            module, "rounding_of_resume", lambda engine: rounding_of_resume(EngineConfig(device="cuda"))
        )
    run = tmp_path / "run"
    assert main(["train", "--run-dir", str(run), *TINY, "--stop-after", "1"]) == 0
    assert (
        "resuming this run will continue within rounding, not bit for bit: cuDNN" in capsys.readouterr().err
    )
    assert main(["train", "--resume", str(run)]) == 0
    assert "it continues within rounding, not bit for bit: cuDNN" in capsys.readouterr().err
    assert [s["precision"] for s in read_starts(run / "environment.json")] == [
        {"training": "float32", "validation": "float32"}
    ] * 2


@pytest.mark.parametrize(("switch", "said"), [("auto", True), ("off", False)])
def test_a_run_from_before_winograd_was_chosen_by_layer_is_told_that_it_rounds_otherwise(
    switch: str,
    said: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from fastdynat.training import resolve_engine

    monkeypatch.setattr(resolve_engine, "winograd_pays", lambda *args, **options: True)
    run = tmp_path / "run"
    assert (
        main(
            [
                "train",
                "--run-dir",
                str(run),
                *TINY,
                "--epochs",
                "3",
                "--stop-after",
                "1",
                "--winograd",
                switch,
            ]
        )
        == 0
    )
    record = run / "environment.json"
    starts = json.loads(record.read_text())
    del starts[0]["winograd"]
    record.write_text(json.dumps(starts))
    told = []
    for _ in range(2):  # told once: the second resume is of a run that this version has gone on with
        capsys.readouterr()
        assert main(["train", "--resume", str(run), "--stop-after", str(2 + len(told)), "--quiet"]) == 0
        told.append(
            "which layers Winograd's algorithm computes: the run continues, but not bit for bit"
            in capsys.readouterr().err
        )
    assert told == [said, False]


def test_a_run_of_a_version_with_other_draws_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", "--run-dir", str(run), *TINY, "--epochs", "3", "--stop-after", "1"]) == 0
    record = run / "environment.json"
    starts = json.loads(record.read_text())
    del starts[0]["draws"]
    record.write_text(json.dumps(starts))
    told = []
    for epochs in (2, 3):
        capsys.readouterr()
        assert main(["train", "--resume", str(run), "--stop-after", str(epochs), "--quiet"]) == 0
        told.append("the attacks of training draw other random numbers" in capsys.readouterr().err)
    assert told == [True, False]


def test_the_record_names_what_is_trained_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("fastdynat.training.arithmetic.operators_in_use", lambda device: "eager")
    found = {amp: arithmetic(EngineConfig(device="cuda", amp=amp))["precision"] for amp in ("off", "bf16")}
    assert found == {"off": "float32 (TF32 convolutions)", "bf16": "bf16"}


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_runs_time_no_algorithms(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    options: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda fn, **kwargs: options.append(kwargs["options"]) or fn)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seed_everything(1, deterministic=deterministic)
    try:
        assert torch.backends.cudnn.benchmark != deterministic
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == deterministic
        compile_whole(torch.sin, mode="max-autotune", what="the sine", fallbacks=NoFallbacks())
        compile_whole(torch.sin, mode="default", what="the sine", fallbacks=NoFallbacks())
        assert [given.get("deterministic", False) for given in options] == [deterministic] * 2
    finally:
        torch.use_deterministic_algorithms(False)
