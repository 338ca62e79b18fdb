"""Burn-in: natural training first, then the method, in whole runs, captured, and across a pause."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.graph_sim import SimulatedRecorder
from support.stepping import assert_same_step, make_batch, moved_network, tiny_network, train_step

from fastdynat.commands.main import main
from fastdynat.methods import Dynat, DynatOptions
from fastdynat.methods.burn_in import BurnIn
from fastdynat.training import parts as build
from fastdynat.training import validation
from fastdynat.training.step import TrainStep

TINY = ["--train-size", "96", "--val-size", "20", "--batch-size", "32", "--steps", "2", "--quiet"]
BURN_IN = ["--epochs", "4", "--burn-in", "2", "--schedule", "cosine", "--ema", "0.9", "--ema-warmup", "0.4"]


def train(run: Path, *flags: str, method: str = "dynat", code: int = 0) -> Path:
    where = (
        ["--resume", str(run), "--quiet"]
        if run.exists()
        else ["--run-dir", str(run), "--method", method, *TINY]
    )
    assert main(["train", *where, *flags]) == code
    return run


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def state(run: Path) -> dict[str, Any]:
    return torch.load(run / "last" / "state.pt", weights_only=True)


def weights(run: Path, name: str = "model", link: str = "last") -> dict[str, torch.Tensor]:
    return load_file(run / link / f"{name}.safetensors")


def momenta(run: Path) -> list[torch.Tensor]:
    return [
        s["momentum_buffer"] for optimizer in state(run)["optimizers"] for s in optimizer["state"].values()
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a burn-in, in one go."""
    return train(tmp_path_factory.mktemp("burn_in") / "whole", *BURN_IN)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def assert_same_run(a: Path, b: Path) -> None:
    for link in ("last", "best"):
        names = {p.stem for p in (a / link).glob("*.safetensors")}
        assert names == {p.stem for p in (b / link).glob("*.safetensors")}
        assert all(equal(weights(a, name, link), weights(b, name, link)) for name in names)
    assert all(torch.equal(x, y) for x, y in zip(momenta(a), momenta(b), strict=True))
    one, other = state(a), state(b)
    assert torch.equal(one["rng"]["torch"], other["rng"]["torch"])
    assert all(one[key] == other[key] for key in ("ema_updates", "global_step", "watch"))
    untimed = [
        [{k: v for k, v in row.items() if k not in ("train_seconds", "images_per_s")} for row in rows(r)]
        for r in (a, b)
    ]
    assert untimed[0] == untimed[1]


def test_a_step_of_the_burn_in_is_cross_entropy_on_clean_images_for_both_networks() -> None:
    networks, references = [moved_network(0), tiny_network(1)], [moved_network(0), tiny_network(1)]
    batch = make_batch()
    logs = train_step(BurnIn(Dynat(DynatOptions())), *networks)(batch)
    losses = [F.cross_entropy(reference.train()(batch.x), batch.labels) for reference in references]
    torch.stack(losses).sum().backward()
    for network, reference in zip(networks, references, strict=True):
        assert_same_step(network, reference)
    assert [float(logs["loss"]), float(logs["guide_loss"])] == pytest.approx([loss.item() for loss in losses])


@pytest.mark.parametrize("ema", [True, False])
def test_it_is_natural_training_and_the_method_starts_from_its_average(tmp_path: Path, ema: bool) -> None:
    average = ("--ema", "0.9") if ema else ()
    flags = ("--epochs", "4", *average, "--stop-after", "2")
    natural = train(tmp_path / "natural", *flags, "--schedule", "constant", method="natural")
    burnt = train(tmp_path / "burnt", *flags, "--burn-in", "2", method="madry")
    assert equal(weights(burnt), weights(natural))
    if ema:
        assert not equal(weights(natural, "model_raw"), weights(natural))
        assert equal(weights(burnt, "model_raw"), weights(natural))
        assert state(burnt)["ema_updates"] == 0
    assert not any(bool(buffer.any()) for buffer in momenta(burnt))
    assert any(bool(buffer.any()) for buffer in momenta(natural))
    assert state(burnt)["global_step"] == 6


def test_each_phase_has_its_columns_and_the_schedule_counts_from_the_switch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tmp_path / "run", *BURN_IN)
    table = rows(run)
    for row in table[:2]:
        assert {"train_acc", "guide_loss", "guide_acc"} <= row.keys()
        assert "train_adv_acc" not in row
    for row in table[2:]:
        assert {"train_adv_acc", "label_agreement"} <= row.keys()
        assert "train_acc" not in row
    # The row has the rate of an epoch's last step: number 2 and 5 of the six of a cosine.
    cosine = [0.03 * (1 + torch.cos(torch.tensor(torch.pi * step / 6)).item()) / 2 for step in (2, 5)]
    assert [row["lr"] for row in table] == pytest.approx([0.03, 0.03, *cosine], rel=1e-5)
    assert [row["global_step"] for row in table] == [3, 6, 9, 12]
    assert state(run)["ema_updates"] == 6
    assert (
        capsys.readouterr().err.count("burn-in is over after 2 epochs: dynat starts from its weight average")
        == 1
    )


@pytest.mark.parametrize("pauses", [[2], [1, 2, 3], [1, 3]])
def test_a_pause_in_either_phase_or_between_them_changes_nothing(
    whole: Path, tmp_path: Path, pauses: list[int]
) -> None:
    parts = tmp_path / "parts"
    for n, epoch in enumerate(pauses):
        train(parts, *([] if n else BURN_IN), "--stop-after", str(epoch))
    assert_same_run(whole, train(parts))


@pytest.mark.parametrize("at_step", [5, 6, 7])
def test_a_signal_around_the_switch_loses_nothing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_step: int
) -> None:
    step, calls = TrainStep.__call__, []

    def interrupted(self: TrainStep, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == at_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch)

    monkeypatch.setattr(TrainStep, "__call__", interrupted)
    train(tmp_path / "parts", *BURN_IN, code=143)
    monkeypatch.undo()
    assert_same_run(whole, train(tmp_path / "parts"))


def test_captured_steps_of_both_phases_compute_what_plain_ones_do(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorders: list[SimulatedRecorder] = []

    def simulated(engine: Any) -> SimulatedRecorder:
        recorders.append(SimulatedRecorder())
        return recorders[-1]

    monkeypatch.setattr(build, "_recorder", simulated)
    captured = train(tmp_path / "captured", *BURN_IN)
    assert [(r.captured, r.replayed) for r in recorders] == [
        (1, 3),
        (1, 3),
    ]  # six steps each, three of them to warm up
    assert_same_run(whole, captured)


def test_natural_weights_are_never_the_best_and_end_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracies = iter([0.9, 0.9, 0.9, 0.9, 0.9, 0.2, 0.9, 0.1])  # clean, PGD-10 by epoch

    class Measured:
        def __init__(self) -> None:
            self.accuracy = next(accuracies)

    monkeypatch.setattr(validation, "measure", lambda *args, **kwargs: Measured())
    run = tmp_path / "run"
    train(
        run,
        "--epochs",
        "4",
        "--burn-in",
        "2",
        "--stop-at",
        "0.5",
        "--patience",
        "2",
        "--stop-after",
        "2",
        method="madry",
    )
    assert (run / "best").resolve() == (
        run / "last"
    ).resolve()  # so that a run has one, whenever it is looked at
    train(run)
    assert [row["best"] for row in rows(run)] == [False, False, True, False]
    assert json.loads((run / "best" / "model.json").read_text())["epoch"] == 3
    watch = state(run)["watch"]
    assert (watch["best"], watch["stale"], watch["robust"]) == (0.2, 1, 0.2)
