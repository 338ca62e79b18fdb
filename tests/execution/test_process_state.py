"""Commands restore the caller's process after success, refusal, divergence and interruption."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.process_snapshot import snapshot

from fastdynat.commands.evaluate.measure_runs import measure_runs
from fastdynat.commands.evaluate.settle import EvalConfig
from fastdynat.commands.main import main
from fastdynat.config import TrainConfig
from fastdynat.execution.process_state import process_state_kept
from fastdynat.methods.configs import default_config
from fastdynat.runs import load_network
from fastdynat.terminal.consoles import error_console
from fastdynat.terminal.progress import ProgressDisplay
from fastdynat.training import new_run
from fastdynat.training.trainer import Trainer

TINY = [
    "--train-size",
    "40",
    "--val-size",
    "20",
    "--batch-size",
    "20",
    "--steps",
    "1",
    "--epochs",
    "1",
    "--quiet",
]
MADRY = [*TINY, "--method", "madry", "--model", "small"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "--run-dir", str(path), *MADRY]) == 0
    return path


@pytest.fixture(params=["plain", "unusual"])
def before(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The state expected afterwards: that of a new process, or one in which no flag has its default."""
    torch.manual_seed(11)
    np.random.seed(12)
    random.seed(13)
    if request.param == "unusual":
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield snapshot()
    finally:
        torch.use_deterministic_algorithms(False)


def assert_unchanged(before: dict[str, Any]) -> None:
    after = snapshot()
    assert [name for name in before if before[name] != after[name]] == []


COMMANDS: dict[str, Callable[[Path, Path], tuple[list[str], int]]] = {
    "train": lambda run, out: (["train", "--run-dir", str(out), *MADRY], 0),
    "train deterministic": lambda run, out: (["train", "--run-dir", str(out), *MADRY, "--deterministic"], 0),
    "train refused late": lambda run, out: (
        ["train", "--run-dir", str(out), *MADRY, "--batch-size", "4000"],
        2,
    ),
    "train diverged": lambda run, out: (["train", "--run-dir", str(out), *MADRY, "--lr", "1e30"], 1),
    "resume": lambda run, out: (["train", "--resume", str(run)], 0),
    "eval": lambda run, out: (
        ["eval", str(run), "--attacks", "clean,pgd2", "--num-images", "20", "--fresh"],
        0,
    ),
    "eval autoattack": lambda run, out: (
        ["eval", str(run), "--attacks", "square3,apgd-ce", "--num-images", "5", "--fresh"],
        0,
    ),
    "bench": lambda run, out: (["bench", "--data", "digits", *BENCH], 0),
    "compare": lambda run, out: (
        [
            "compare",
            "--methods",
            "madry,natural",
            "--seeds",
            "1",
            "--out",
            str(out),
            *TINY,
            "--attacks",
            "clean",
        ],
        0,
    ),
    "export": lambda run, out: (
        ["export", str(run), "--out", str(out.with_suffix(".pt2")), "--format", "torch"],
        0,
    ),
}
BENCH = ["--method", "madry", "--model", "small", "--batch-size", "4", "--steps", "1", "--seconds", "0.01"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_in_the_callers_process(
    name: str, run: Path, before: dict[str, Any], tmp_path: Path
) -> None:
    argv, code = COMMANDS[name](run, tmp_path / "out")
    assert main(argv) == code
    assert_unchanged(before)


def tiny_config(path: Path) -> TrainConfig[Any]:
    from fastdynat.config import override

    values = {
        "train_size": 40,
        "val_size": 20,
        "batch_size": 20,
        "steps": 1,
        "epochs": 1,
        "run_dir": str(path),
        "quiet": True,
    }
    return override(default_config("madry"), {"method": "madry", "deterministic": True, **values}, "test")


def test_the_engine_as_a_library(before: dict[str, Any], tmp_path: Path) -> None:
    with new_run(tiny_config(tmp_path / "run")) as trainer:
        assert torch.are_deterministic_algorithms_enabled()
        trainer.fit()
    assert_unchanged(before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError])
def test_after_an_error_in_the_middle(
    error: type[BaseException], before: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Trainer, *args: object) -> None:
        raise error

    monkeypatch.setattr(Trainer, "_train_epoch", fails)
    with pytest.raises(error), new_run(tiny_config(tmp_path / "run")) as trainer:
        trainer.fit()
    assert_unchanged(before)


def test_reading_and_measuring_networks(run: Path, before: dict[str, Any]) -> None:
    display = ProgressDisplay(error_console(), quiet=True)
    load_network(run / "best" / "model.safetensors")
    assert_unchanged(before)
    measure_runs([run], EvalConfig(attacks="clean", num_images=10, cache="off"), display)
    assert_unchanged(before)


def test_two_runs_in_one_process_are_two_runs_in_two(run: Path, tmp_path: Path) -> None:
    """Nothing of an earlier run, deterministic or not, reaches a later one."""
    from safetensors.torch import load_file

    assert main(["train", "--run-dir", str(tmp_path / "a"), *MADRY, "--deterministic", "--seed", "5"]) == 0
    assert main(["train", "--run-dir", str(tmp_path / "b"), *MADRY]) == 0
    first, second = (load_file(path / "last" / "model.safetensors") for path in (run, tmp_path / "b"))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ["matmul", "cudnn"])
def test_tf32_set_through_the_newer_names_is_no_obstacle(name: str) -> None:
    owner = torch.backends.cuda.matmul if name == "matmul" else torch.backends.cudnn
    if not hasattr(owner, "fp32_precision"):
        pytest.skip("this torch has no fp32_precision")
    before = owner.fp32_precision
    owner.fp32_precision = "tf32"
    try:
        with process_state_kept():
            pass
        assert owner.fp32_precision == "tf32"
    finally:
        owner.fp32_precision = before
