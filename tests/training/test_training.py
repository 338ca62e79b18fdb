"""Whole runs on the command line: resuming, stopping, precision, averaging, and the files of a run."""

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import needs
from safetensors.torch import load_file
from support.same_run import assert_same_run, rows

from fastdynat.attack_engine.engine import AttackEngine
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.commands.main import main
from fastdynat.runs import load_network
from fastdynat.training.average import WeightAverage
from fastdynat.training.step import TrainStep
from fastdynat.training.trainer import Trainer

# 96 digits in 3 batches, two attack steps: a run takes a second.
TINY = [
    "--train-size",
    "96",
    "--val-size",
    "20",
    "--batch-size",
    "32",
    "--steps",
    "2",
    "--epochs",
    "3",
    "--quiet",
]


def train(run: Path, *flags: str, code: int = 0) -> Path:
    assert main(["train", "--run-dir", str(run), *TINY, *flags]) == code
    return run


def resume(run: Path, *flags: str, code: int = 0) -> Path:
    assert main(["train", "--resume", str(run), "--quiet", *flags]) == code
    return run


VARIANTS = {
    "dynat": [],
    "madry-uniform-nesterov-cosine": [
        "--method",
        "madry",
        "--nesterov",
        "--schedule",
        "cosine",
        "--augment",
        "crop-flip",
    ],
    "dynat-unfolded-autograd": ["--fold", "off", "--no-closed-form"],
    "natural": ["--method", "natural", "--normalize", "dataset"],
    "dynat-group-norm": ["--model", "small-silu-gn"],
    "madry-dyart-like": [
        *(
            "--method",
            "madry",
            "--ema",
            "0.995",
            "--ema-warmup",
            "0.4",
            "--ema-buffers",
            "copy",
            "--no-decay-norms",
        ),
        *("--schedule", "onecycle", "--warmup", "0.1"),
    ],
    "dynat-ema-clip-joint-bf16": [
        "--ema",
        "0.9",
        "--clip-grad",
        "0.5",
        "--optimizers",
        "joint",
        "--amp",
        "bf16",
        "--channels-last",
    ],
    "madry-fp16-onecycle": [
        "--method",
        "madry",
        "--amp",
        "fp16",
        "--schedule",
        "onecycle",
        "--attack-bn",
        "train",
    ],
    "natural-triangular": ["--method", "natural", "--schedule", "triangular", "--warmup", "0.4"],
}


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_resume_is_bitwise(tmp_path: Path, flags: list[str]) -> None:
    whole = train(tmp_path / "whole", *flags)
    parts = train(tmp_path / "parts", *flags, "--stop-after", "1")
    assert len(rows(parts)) == 1
    resume(parts, "--stop-after", "2")
    resume(parts)
    assert_same_run(whole, parts)


def test_a_network_without_batch_norm_trains_without_a_word_about_folding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tmp_path / "run", "--model", "small_gn", "--epochs", "1")
    said = capsys.readouterr().err
    assert "fold" not in said
    assert "attack: float32 replica, no batch norm" in said
    assert "small_gn with guide small" in said
    assert load_network(run / "last" / "model.safetensors")[1].architecture == "small_gn"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("at_step", [1, 4, 5])
def test_a_signal_finishes_the_step_saves_and_resumes_exactly(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    code: int,
    at_step: int,
) -> None:
    whole = train(tmp_path / "whole")
    step, calls = TrainStep.__call__, []

    def interrupted(self: TrainStep, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == at_step:
            os.kill(os.getpid(), number)
        return step(self, batch)

    monkeypatch.setattr(TrainStep, "__call__", interrupted)
    assert main(["train", "--run-dir", str(tmp_path / "parts"), *TINY[:-1]]) == code
    assert f"go on with: fastdynat train --resume {tmp_path / 'parts'}" in capsys.readouterr().err
    monkeypatch.undo()
    state = torch.load(tmp_path / "parts" / "last" / "state.pt", weights_only=True)
    assert state["global_step"] == at_step
    assert_same_run(whole, resume(tmp_path / "parts"))


def test_a_signal_during_validation_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(tmp_path / "whole")
    validate, calls = Trainer._validate, []

    def interrupted(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "_validate", interrupted)
    train(tmp_path / "parts", code=143)
    monkeypatch.undo()
    assert len(rows(tmp_path / "parts")) == 1
    assert_same_run(whole, resume(tmp_path / "parts"))


def test_checkpoints_inside_an_epoch_change_nothing(tmp_path: Path) -> None:
    """Every step is later than a millionth of a minute after the last save, so each is saved."""
    assert_same_run(train(tmp_path / "a"), train(tmp_path / "b", "--save-every", "1e-6"))


def test_a_run_killed_before_its_first_checkpoint_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tmp_path / "whole")

    class Killed(BaseException):
        """An exception that no command catches."""

    def killed(self: Trainer) -> None:
        raise Killed

    monkeypatch.setattr(Trainer, "fit", killed)
    with pytest.raises(Killed):
        main(["train", "--run-dir", str(tmp_path / "parts"), *TINY])
    monkeypatch.undo()
    assert_same_run(whole, resume(tmp_path / "parts"))


def test_stop_at_ends_a_run_that_is_good_enough_and_a_higher_one_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(tmp_path / "whole")
    scores = [row["val_pgd10_acc"] for row in rows(whole)]
    target = sorted(scores)[1]
    epochs = next(n for n, score in enumerate(scores, 1) if score >= target)
    assert epochs < 3
    parts = train(tmp_path / "parts", "--stop-at", str(target))
    assert len(rows(parts)) == epochs
    assert f"after {epochs} epochs: --stop-at {target:g} is reached" in capsys.readouterr().err
    resume(parts)  # still good enough
    assert len(rows(parts)) == epochs
    assert_same_run(whole, resume(parts, "--stop-at", "1"))


def test_more_epochs_where_the_schedule_allows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = train(tmp_path / "whole", "--schedule", "constant")
    longer = train(tmp_path / "longer", "--schedule", "constant", "--epochs", "1")
    assert_same_run(whole, resume(longer, "--epochs", "3"))
    cosine = train(tmp_path / "cosine", "--schedule", "cosine", "--epochs", "2")
    resume(cosine, "--epochs", "3", code=2)
    assert len(rows(cosine)) == 2
    assert "start with --epochs 3 --stop-after 2" in capsys.readouterr().err
    average = train(
        tmp_path / "average", "--schedule", "constant", "--epochs", "2", "--ema", "0.9", "--ema-warmup", "0.5"
    )
    resume(average, "--epochs", "4", code=2)
    assert "--ema-warmup depends on the number of epochs" in capsys.readouterr().err
    early = train(tmp_path / "early", "--schedule", "constant", "--epochs", "2", "--early-steps", "1")
    resume(early, "--epochs", "4", code=2)
    assert "--early-share depends on the number of epochs" in capsys.readouterr().err


def test_fewer_steps_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    run_attack = AttackEngine.run

    def spy(self: AttackEngine, x: Any, goal: Any, spec: PGDSpec, **kwargs: Any) -> Any:
        taken.append(spec.steps)
        return run_attack(self, x, goal, spec, **kwargs)

    monkeypatch.setattr(AttackEngine, "run", spy)
    flags = ("--early-steps", "0", "--early-share", "0.5", "--epochs", "4")
    whole = train(tmp_path / "whole", *flags)
    assert taken == [0] * 6 + [2] * 6  # three batches an epoch
    parts = resume(train(tmp_path / "parts", *flags, "--stop-after", "1"))
    assert_same_run(whole, parts)


def test_a_run_leaves_the_documented_files(tmp_path: Path) -> None:
    run = train(tmp_path / "run", "--ema", "0.9")
    files = {str(p.relative_to(run)) for link in ("last", "best") for p in (run / link).iterdir()}
    for link in ("last", "best"):
        for stem in ("model", "model_raw", "guide"):
            assert {f"{link}/{stem}.safetensors", f"{link}/{stem}.json"} <= files
    assert "last/state.pt" in files
    assert {p.name for p in run.iterdir()} >= {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "metrics.csv",
        "best",
        "last",
    }
    about = json.loads((run / "last" / "model.json").read_text())
    assert (about["architecture"], about["dataset"], about["eps"], about["epoch"]) == (
        "small",
        "digits",
        0.1,
        3,
    )
    table = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    wanted = {
        "loss",
        "guide_loss",
        "guide_acc",
        "label_agreement",
        "zero_grad_share",
        "train_adv_acc",
        "val_pgd10_acc",
        "lr",
    }
    assert wanted <= table[0].keys()
    assert [int(row["epoch"]) for row in table] == [1, 2, 3]
    # The guide's training accuracy on the batch is how often its label is right: two routes to one number.
    assert rows(run)[-1]["guide_acc"] == rows(run)[-1]["label_agreement"]
    links = {(run / link).resolve().name for link in ("last", "best")}
    assert {p.name for p in (run / "checkpoints").iterdir()} == links


def test_best_is_the_epoch_with_the_highest_validation_pgd_accuracy(tmp_path: Path) -> None:
    run = train(tmp_path / "run", "--method", "madry", "--epochs", "5", "--train-size", "300")
    score = [row["val_pgd10_acc"] for row in rows(run)]
    best = json.loads((run / "best" / "model.json").read_text())
    assert best["epoch"] == 1 + score.index(max(score))
    assert best["val_pgd10_acc"] == max(score)
    assert [row["epoch"] for row in rows(run) if row["best"]][-1] == best["epoch"]


def test_joint_and_separate_optimisers_agree_to_the_last_bit(tmp_path: Path) -> None:
    a, b = (train(tmp_path / kind, "--optimizers", kind) for kind in ("separate", "joint"))
    for name in ("model", "guide"):
        left, right = (load_file(run / "last" / f"{name}.safetensors") for run in (a, b))
        assert all(torch.equal(left[key], right[key]) for key in left)


def test_the_weight_average_is_what_is_saved_as_the_model(tmp_path: Path) -> None:
    """One epoch of three steps at keep-rate 0.5: after the first update a copy, then lerp by half each."""
    seen: list[dict[str, torch.Tensor]] = []
    step = TrainStep.__call__

    def record(self: TrainStep, batch: Any) -> Any:
        logs = step(self, batch)
        seen.append({k: v.detach().clone() for k, v in self.networks.raw["model"].state_dict().items()})
        return logs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "__call__", record)
        run = train(tmp_path / "run", "--ema", "0.5", "--epochs", "1")
    saved, raw = (load_file(run / "last" / f"{name}.safetensors") for name in ("model", "model_raw"))
    for key in ("net.features.0.weight", "net.features.1.running_mean", "net.linear.bias"):
        expected = seen[0][key]
        for state in seen[1:]:
            expected = 0.5 * expected + 0.5 * state[key]
        torch.testing.assert_close(saved[key], expected)
        assert torch.equal(raw[key], seen[-1][key])
    # The accuracies are those of the average, which is what was validated.
    validated = [
        json.loads((run / "last" / f"{name}.json").read_text())["val_clean_acc"]
        for name in ("model", "model_raw")
    ]
    assert validated == [rows(run)[-1]["val_clean_acc"], None]


def test_the_average_is_a_copy_for_its_share_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three epochs of three steps: the first half, rounded up to five steps, are copies."""
    kept: list[float] = []
    update = WeightAverage.update

    def spy(self: WeightAverage) -> None:
        kept.append(self.keep_rate())
        update(self)

    monkeypatch.setattr(WeightAverage, "update", spy)
    train(tmp_path / "run", "--method", "natural", "--ema", "0.25", "--ema-warmup", "0.5")
    assert kept == pytest.approx([0.0] * 5 + [1 / 10, 2 / 11, 3 / 12, 0.25])


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path: Path) -> None:
    a, b, c = (train(tmp_path / name, "--seed", seed) for name, seed in (("a", "5"), ("b", "5"), ("c", "6")))
    assert_same_run(a, b)
    assert rows(a)[0]["loss"] != rows(c)[0]["loss"]


def test_methods_start_from_the_same_weights_data_and_validation_images(tmp_path: Path) -> None:
    """Controls differ from DYNAT by the method alone: at learning rate ~0 all keep their initial weights."""
    flags = ("--lr", "1e-30", "--epochs", "1", "--weight-decay", "0")
    runs = [train(tmp_path / m, "--method", m, *flags) for m in ("natural", "madry", "dynat")]
    states = [load_file(run / "last" / "model.safetensors") for run in runs]
    for state in states[1:]:
        for key in (k for k in state if "running" not in k and "num_batches" not in k):
            torch.testing.assert_close(state[key], states[0][key], rtol=0, atol=1e-20, msg=key)


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_last_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    flags = [*TINY, "--method", "natural", "--schedule", "constant", "--lr", "1e30"]
    assert main(["train", "--run-dir", str(run), *flags]) == 1  # said although --quiet
    assert "training diverged: loss is" in capsys.readouterr().err
    assert not (run / "last").exists()


def test_without_validation_images_best_follows_last(tmp_path: Path) -> None:
    run = train(tmp_path / "run", "--val-size", "0")
    assert (run / "best").resolve() == (run / "last").resolve()
    assert "val_pgd10_acc" not in rows(run)[-1]


def test_val_every_skips_epochs_but_never_the_last(tmp_path: Path) -> None:
    validated = [
        row["val_pgd10_acc"] is not None for row in rows(train(tmp_path / "run", "--val-every", "2"))
    ]
    assert validated == [False, True, True]


def test_training_overfits_a_handful_of_images(tmp_path: Path) -> None:
    run = train(
        tmp_path / "run", "--method", "natural", "--train-size", "32", "--epochs", "25", "--lr", "0.05"
    )
    assert rows(run)[-1]["train_acc"] == 1.0


def test_batch_norm_momentum_is_the_networks_own_or_as_asked(tmp_path: Path) -> None:
    """After one batch the running mean is momentum times the batch's."""
    means = []
    for flags in ([], ["--bn-momentum", "0.02"]):
        run = train(
            tmp_path / f"run{len(means)}",
            "--method",
            "natural",
            *flags,
            "--batch-size",
            "96",
            "--epochs",
            "1",
        )
        means.append(load_file(run / "last" / "model.safetensors")["net.features.1.running_mean"])
    torch.testing.assert_close(means[1], 0.2 * means[0])


def test_the_guide_is_a_loadable_network(tmp_path: Path) -> None:
    guide, sidecar = load_network(train(tmp_path / "run") / "last" / "guide.safetensors")
    assert sidecar.role == "guide"
    assert guide(torch.rand(2, 1, 32, 32)).shape == (2, 10)


@needs("cxx")
@pytest.mark.slow
def test_a_compiled_run_learns_what_an_eager_run_learns(tmp_path: Path) -> None:
    eager = train(tmp_path / "eager", "--epochs", "1", "--lr", "0.01")
    compiled = train(tmp_path / "compiled", "--epochs", "1", "--lr", "0.01", "--compile")
    for key in ("loss", "guide_loss"):
        assert rows(compiled)[0][key] == pytest.approx(rows(eager)[0][key], rel=2e-3)
    resume(train(tmp_path / "parts", "--compile", "--stop-after", "1"))


@needs("tensorboard")
def test_tensorboard_events_are_written(tmp_path: Path) -> None:
    assert list((train(tmp_path / "run", "--tensorboard") / "tensorboard").glob("events*"))
