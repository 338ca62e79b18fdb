"""An epoch's end costs training no trace and no wait for the disk; checkpoints are of their own moment."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.networks import tiny_cnn
from torch import Tensor, nn

from fastdynat.attack_engine import replica
from fastdynat.attacks import parse_attack
from fastdynat.commands.main import main
from fastdynat.data import ImageSet
from fastdynat.evaluation import KeptReplica, measure
from fastdynat.evaluation.measure import _attacked
from fastdynat.runs import load_network
from fastdynat.runs.failures import WriteError
from fastdynat.runs.metrics_rows import read_rows
from fastdynat.training import background_writer as background
from fastdynat.training import checkpoint_writer, trainer, validation
from fastdynat.training.background_writer import BackgroundWriter
from fastdynat.training.training_state import snapshot

TINY = [
    "--method",
    "madry",
    "--steps",
    "1",
    "--train-size",
    "96",
    "--val-size",
    "20",
    "--batch-size",
    "32",
    "--quiet",
]


def test_nothing_is_traced_after_the_first_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced, real = [], replica.check_folding

    def counted(*args: Any, **options: Any) -> None:
        traced.append(1)
        real(*args, **options)

    monkeypatch.setattr(replica, "check_folding", counted)
    counts = []
    for epochs in (1, 3):
        traced.clear()
        assert main(["train", "--run-dir", str(tmp_path / str(epochs)), *TINY, "--epochs", str(epochs)]) == 0
        counts.append(len(traced))
    assert counts == [2, 2]  # for training, for validation


def test_validation_on_a_kept_replica_is_validation_on_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []

    def both(*args: Any, kept: KeptReplica, **options: Any) -> Any:
        found, want = measure(*args, kept=kept, **options), measure(*args, **options)
        compared.append(
            (found.robust_bits, found.zero_grad_share) == (want.robust_bits, want.zero_grad_share)
        )
        return found

    monkeypatch.setattr(validation, "measure", both)
    command = [
        "train",
        "--run-dir",
        str(tmp_path / "r"),
        *TINY,
        "--epochs",
        "3",
        "--ema",
        "0.5",
        "--burn-in",
        "1",
    ]
    assert main(command) == 0
    assert compared == [True] * 6


def test_a_kept_replica_follows_weights_statistics_and_another_network() -> None:
    device, kept = torch.device("cpu"), KeptReplica()
    images = ImageSet(torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8), torch.arange(12) % 10)
    attack = parse_attack("pgd3", eps=0.1, step_size=0.04, norm="linf")
    given: dict[str, Any] = {"device": device, "batch_size": 5, "seed": 1}
    model = tiny_cnn(0).train()
    for round_ in range(4):
        if round_ == 2:
            model = tiny_cnn(5).train()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.3)
            model(torch.rand(16, 3, 8, 8))  # moves the running statistics
        found, want = (measure(model, images, attack, kept=k, **given) for k in (kept, None))
        assert (found.robust_bits, found.zero_grad_share) == (want.robust_bits, want.zero_grad_share)


class Scaled(nn.Module):
    """Logits times `scale`, a Python number."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(48, 10), 1.0

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 4, 4) -> (N, 10)."""
        return self.scale * self.fc(x.flatten(1))


def test_a_kept_replica_follows_a_python_number() -> None:
    model, x, kept = Scaled().eval(), torch.rand(4, 3, 4, 4), KeptReplica()
    for scale in (1.0, 3.0, 3.0):
        model.scale = scale
        ascent = kept.of(model, (), lambda: _attacked(model, x, None, False, False))
        torch.testing.assert_close(ascent.logits(x), scale * F.linear(x.flatten(1), *model.fc.parameters()))


def test_the_training_thread_never_waits_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real, fit = os.fsync, trainer.Trainer.fit

    def watched(self: trainer.Trainer) -> Any:
        def counted(descriptor: int) -> None:
            synced.append(threading.current_thread().name)
            real(descriptor)

        monkeypatch.setattr(os, "fsync", counted)
        try:
            return fit(self)
        finally:
            monkeypatch.setattr(os, "fsync", real)

    monkeypatch.setattr(trainer.Trainer, "fit", watched)
    assert main(["train", "--run-dir", str(tmp_path / "r"), *TINY, "--epochs", "3"]) == 0
    assert len(synced) >= 3 * 5  # weights, state, manifest, two folders
    assert {name.partition("_")[0] for name in synced} == {"fastdynat-writer"}


def test_what_is_written_is_the_moment_of_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is slower than an epoch; weights, momentum and metrics are still those of the epoch's end."""
    going_on, real, moments, written = threading.Event(), checkpoint_writer.write_weights, [], []

    def slow(folder: Path, files: Any) -> None:
        going_on.wait(60)
        written.append({name: value.clone() for name, value in files[0].state.items()})
        real(folder, files)

    def remember(self: trainer.Trainer, *, best: bool, row: Any = None) -> None:
        raw = self.networks.raw["model"].state_dict()
        moments.append(snapshot({"raw": raw, "state": self.state_dict()}))
        save(self, best=best, row=row)

    def step_on(self: trainer.Trainer, stop: Any, display: Any) -> None:
        train_epoch(self, stop, display)
        if self.epoch == 1:
            going_on.set()

    save, train_epoch = trainer.Trainer._save, trainer.Trainer._train_epoch
    monkeypatch.setattr(checkpoint_writer, "write_weights", slow)
    monkeypatch.setattr(trainer.Trainer, "_save", remember)
    monkeypatch.setattr(trainer.Trainer, "_train_epoch", step_on)
    stored: list[dict[str, Any]] = []
    write_state = checkpoint_writer.write_training_state
    monkeypatch.setattr(
        checkpoint_writer,
        "write_training_state",
        lambda path, state: (stored.append(snapshot(state)), write_state(path, state)),
    )
    run = tmp_path / "r"
    assert main(["train", "--run-dir", str(run), *TINY, "--epochs", "2"]) == 0
    assert [moment["state"]["epoch"] for moment in moments] == [1, 2]
    assert any(not torch.equal(moments[0]["raw"][key], value) for key, value in moments[1]["raw"].items())
    for moment, state, weights in zip(moments, stored, written, strict=True):
        assert all(torch.equal(moment["raw"][key], value) for key, value in weights.items())
        assert state["row"] == moment["state"]["row"]
        for one, other in zip(state["optimizers"], moment["state"]["optimizers"], strict=True):
            for key, kept in one["state"].items():
                assert torch.equal(kept["momentum_buffer"], other["state"][key]["momentum_buffer"])
    assert [row["epoch"] for row in read_rows(run / "metrics.jsonl")] == [1, 2]


def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls, real = [], checkpoint_writer.write_training_state

    def full(path: Path, state: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise WriteError(path, "No space left on device; 1,234 bytes are needed")
        real(path, state)

    monkeypatch.setattr(checkpoint_writer, "write_training_state", full)
    run = tmp_path / "r"
    assert main(["train", "--run-dir", str(run), *TINY, "--epochs", "4"]) == 2
    err = capsys.readouterr().err
    assert err.count("No space left on device; 1,234 bytes are needed") == 1
    assert "Traceback" not in err
    assert [row["epoch"] for row in read_rows(run / "metrics.jsonl")] == [1]
    assert main(["train", "--resume", str(run), "--quiet"]) == 0
    whole = tmp_path / "whole"
    assert main(["train", "--run-dir", str(whole), *TINY, "--epochs", "4"]) == 0
    one, other = (load_network(path / "last" / "model.safetensors")[0].state_dict() for path in (run, whole))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_last_write_that_fails_is_raised_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, state: Any) -> None:
        raise WriteError(path, "No space left on device")

    monkeypatch.setattr(checkpoint_writer, "write_training_state", full)
    assert main(["train", "--run-dir", str(tmp_path / "r"), *TINY, "--epochs", "1"]) == 2


def test_writes_follow_each_other_and_failures_reach_the_caller() -> None:
    done: list[int] = []

    def fail() -> None:
        raise WriteError(Path("x"), "full")

    with BackgroundWriter() as writer:
        for number in range(3):
            writer.submit(lambda number=number: done.append(number))
    assert done == [0, 1, 2]
    with BackgroundWriter() as writer:
        writer.submit(fail)
        with pytest.raises(WriteError):
            writer.wait()
        writer.check()
        writer.wait()  # told once
    failing = BackgroundWriter()
    failing.submit(fail)
    with pytest.raises(WriteError), failing:
        pass
    # The block's own error comes first.
    other = BackgroundWriter()
    other.submit(fail)
    with pytest.raises(ZeroDivisionError), other:
        _ = 1 / 0


def test_no_thread_outlives_its_write() -> None:
    """One that computed would keep OpenMP threads, beside which those of training sleep between loops."""
    writer = BackgroundWriter()
    writer.submit(lambda: torch.zeros(1 << 20).relu_())
    writer.wait()
    assert not any(thread.name.startswith(background.THREAD) for thread in threading.enumerate())


class LazyDisk:
    """In the place of the writer's thread: it begins each write only when the training waits for it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.to_be_written = 0
        self.clock = 0.0  # seconds that the training has waited

    def submit(self, write: Any) -> "LazyDisk":
        self.write, self.to_be_written = write, self.to_be_written + 1
        return self

    def done(self) -> bool:
        return False

    def result(self) -> None:
        self.clock += 40
        self.to_be_written -= 1
        self.write()

    def shutdown(self) -> None:
        assert self.to_be_written == 0

    def perf_counter(self) -> float:
        return self.clock + time.perf_counter()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> LazyDisk:
    disk = LazyDisk()
    monkeypatch.setattr(background, "ThreadPoolExecutor", lambda *args, **options: disk)
    return disk


def test_one_snapshot_is_in_memory_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: LazyDisk
) -> None:
    """A disk that is slower than an epoch is waited for before the next copies are made, not after."""
    beside, weights_now = [], checkpoint_writer.weights_now

    def copied(*args: Any, **options: Any) -> Any:
        beside.append(disk.to_be_written)
        return weights_now(*args, **options)

    monkeypatch.setattr(checkpoint_writer, "weights_now", copied)
    assert main(["train", "--run-dir", str(tmp_path / "r"), *TINY, "--epochs", "3"]) == 0
    assert beside == [0, 0, 0]


def test_waiting_for_the_disk_is_no_time_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: LazyDisk
) -> None:
    """Workers of the torch loader are forked while nothing is written; images per second exclude the wait."""
    monkeypatch.setattr(trainer, "time", disk)
    run = tmp_path / "r"
    command = ["train", "--run-dir", str(run), *TINY, "--epochs", "3", "--loader", "torch", "--workers", "1"]
    assert main(command) == 0
    assert disk.clock == 3 * 40
    assert max(row["train_seconds"] for row in read_rows(run / "metrics.jsonl")) < 40
