"""The recipes' options: what cannot work is refused; runs stored before an option existed resume alike."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastdynat.commands.main import main
from fastdynat.methods.configs import stored_config

TINY = [
    "--train-size",
    "96",
    "--val-size",
    "20",
    "--batch-size",
    "32",
    "--steps",
    "2",
    "--quiet",
    "--seed",
    "3",
]
NEW = (
    "pad_mode",
    "epoch_steps",
    "bn_reset_epoch",
    "cycle_momentum",
    "base_momentum",
    "max_momentum",
    "burn_in_lr",
)
NEW += ("schedule_by", "schedule_ahead", "flat_pixel_test", "bn_attack_forward", "bn_clean_after")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--cycle-momentum"],
            "schedule release has no cycle; use --no-cycle-momentum, or --schedule onecycle or triangular",
        ),
        (
            ["--max-momentum", "0.9"],
            "--max-momentum 0.9: the momentum does not cycle; add --cycle-momentum, or leave it out",
        ),
        (
            ["--schedule", "onecycle", "--cycle-momentum", "--momentum", "0"],
            "--cycle-momentum needs --momentum above 0",
        ),
        (
            ["--schedule", "onecycle", "--cycle-momentum", "--base-momentum", "0.96"],
            "--base-momentum and max_momentum must be in [0, 1) in this order, got 0.96 and 0.95",
        ),
        (
            ["--schedule", "onecycle", "--cycle-momentum", "--max-momentum", "1"],
            "--max-momentum must be in [0, 1), got 1",
        ),
        (
            ["--burn-in-lr", "0.1"],
            "--burn-in-lr 0.1: there is no burn-in; leave it out, or give --burn-in epochs",
        ),
        (["--burn-in", "1", "--burn-in-lr", "0"], "--burn-in-lr must be above 0, got 0"),
        (["--schedule-ahead=-1"], "--schedule-ahead must be a number of updates >= 0, got -1"),
        (["--epoch-steps", "0"], "--epoch-steps must be a number of updates >= 1, got 0"),
        (["--bn-reset-epoch=-1"], "--bn-reset-epoch must be an epoch counted from 0, got -1"),
        (
            ["--augment", "crop", "--image-size", "4", "--pad-mode", "reflect"],
            "cannot be padded by reflecting 4 pixels",
        ),
    ],
)
def test_refusals(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--method", "madry", "--run-dir", str(tmp_path / "run"), *TINY, *flags]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert not (tmp_path / "run").exists()


def test_padding_without_crops_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--pad-mode", "reflect", "--epochs", "1"]
    assert main(["train", "--method", "madry", "--run-dir", str(tmp_path / "run"), *TINY, *flags]) == 0
    assert "pad_mode reflect has no effect: augmentation none takes no crops" in capsys.readouterr().err


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "last" / "model.safetensors")


def forget(run: Path) -> None:
    """Make the stored configuration that of a run from before the options."""
    lines = (run / "config.yaml").read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.partition(":")[0] not in NEW]
    assert len(lines) - len(kept) >= 9
    (run / "config.yaml").write_text("".join(kept))


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("madry", ["--attack-bn", "train", "--schedule", "onecycle", "--nesterov", "--awp", "0.01"]),
        ("dyart", ["--no-flat-pixel-test", "--r0", "0.3", "--lr", "0.01", "--burn-in", "1", "--ema", "0.9"]),
    ],
)
def test_a_run_from_before_goes_on_as_it_began(method: str, flags: list[str], tmp_path: Path) -> None:
    """(Runs made before these options existed were resumed too, at the time: equal to the last bit.)"""
    runs = [tmp_path / name for name in ("whole", "parts")]
    for run, more in zip(runs, ([], ["--stop-after", "1"]), strict=True):
        assert (
            main(["train", "--method", method, "--run-dir", str(run), *TINY, "--epochs", "3", *flags, *more])
            == 0
        )
    forget(runs[1])
    config = stored_config(runs[1])
    assert getattr(config.options, "flat_pixel_test", False) is False
    assert main(["train", "--resume", str(runs[1]), "--quiet"]) == 0
    want, got = weights(runs[0]), weights(runs[1])
    assert want.keys() == got.keys()
    assert all(torch.equal(want[key], got[key]) for key in want)


RECIPE_LIKE = [
    "--epochs",
    "4",
    "--burn-in",
    "1",
    "--burn-in-lr",
    "0.02",
    "--epoch-steps",
    "5",
    "--bn-reset-epoch",
    "1",
]
RECIPE_LIKE += [
    "--schedule",
    "onecycle",
    "--schedule-by",
    "epoch",
    "--cycle-momentum",
    "--nesterov",
    "--schedule-ahead",
    "1",
]
RECIPE_LIKE += [
    "--attack-bn",
    "train",
    "--bn-attack-forward",
    "--bn-clean-after",
    "--augment",
    "crop",
    "--pad-mode",
    "reflect",
]


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("pauses", [[1], [2, 3]])
def test_a_run_with_all_of_them_can_be_paused(pauses: list[int], tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    start = ["train", "--method", "madry", *TINY, *RECIPE_LIKE]
    assert main([*start, "--run-dir", str(whole)]) == 0
    assert [row["global_step"] for row in rows(whole)] == [5, 10, 15, 20]
    for n, epoch in enumerate(pauses):
        again = ["train", "--resume", str(parts), "--quiet"] if n else [*start, "--run-dir", str(parts)]
        assert main([*again, "--stop-after", str(epoch)]) == 0
    assert main(["train", "--resume", str(parts), "--quiet"]) == 0
    want, got = weights(whole), weights(parts)
    assert all(torch.equal(want[key], got[key]) for key in want)
    state = torch.load(parts / "last" / "state.pt", weights_only=True)
    assert all(
        0.85 <= float(group["momentum"]) <= 0.95 for o in state["optimizers"] for group in o["param_groups"]
    )
