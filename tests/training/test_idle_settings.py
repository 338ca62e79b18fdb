"""Settings without effect on a run are said; those that do something are not."""

import logging
from pathlib import Path

import pytest

from fastdynat.commands.main import main
from fastdynat.commands.train import early_flags, parse_train
from fastdynat.training import new_run

TINY = ["--train-size", "32", "--val-size", "20", "--batch-size", "16", "--steps", "1", "--epochs", "2"]


def said(flags: str, folder: Path, caplog: pytest.LogCaptureFixture) -> str:
    """What the start of a run says."""
    argv = ["--run-dir", str(folder / "run"), "--method", "madry", *TINY, *flags.split(), "--quiet"]
    with caplog.at_level(logging.INFO), new_run(parse_train(argv, early_flags(argv)).command.train):
        return caplog.text


@pytest.mark.parametrize(
    ("flags", "idle"),
    [
        ("--awp 0.01 --awp-warmup 2", "awp 0.01 has no effect: --awp-warmup 2 leaves out all 2 epochs"),
        ("--awp 0.01 --awp-warmup 1 --burn-in 1", "awp 0.01 has no effect: --awp-warmup 1 leaves out all 1 "),
        ("--bn-reset-epoch 2", "bn_reset_epoch 2 has no effect: the method has 2 epochs, counted from 0"),
        (
            "--schedule cosine --schedule-epochs 1",
            "from epoch 2 of 2 on the learning rate is 0: --schedule cosine over 1 epochs",
        ),
        (
            "--schedule triangular --schedule-by epoch",
            "in epoch 1 of 2 the learning rate is 0: it begins at 0, and changes only between epochs",
        ),
        (
            "--schedule triangular --schedule-by epoch --burn-in 1 --epochs 4",
            "in epoch 2 of 4 the learning rate is 0: it begins at 0",
        ),
        ("--model small-gn --attack-bn train", "attack_bn train has no effect: small-gn has no batch norm"),
        ("--model small-gn --ema 0.5 --ema-buffers copy", "ema_buffers copy has no effect: small-gn has no"),
        ("--model small-gn --bn-momentum 0.2", "bn_momentum 0.2 has no effect: small-gn has no batch norm"),
        ("--extra-data x.npz --extra-share 0", "extra_data x.npz has no effect: --extra-share 0 takes no"),
        ("--method mail", "weight_from 0.625: the method has 2 epochs, and what begins after this share of"),
        ("--method gairat --epochs 1", "weight_from 0.5: the method has 1 epochs"),
        ("--method mail --epochs 3 --burn-in 1", "weight_from 0.625: the method has 2 epochs"),
        ("--method gairat --weight-from 1", "weight_from 1: the method has 2 epochs"),
        ("--method dynat --weighting mail", "weight_from 0.625: the method has 2 epochs"),
        ("--optimizers joint", "optimizers joint has no effect: method madry trains one network"),
        ("--decay-exempt listed", "decay_exempt listed has no effect: small lists no parameters"),
    ],
)
def test_what_has_no_effect_is_said(
    flags: str, idle: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert idle in said(flags, tmp_path, caplog)


def test_introspection_that_never_begins_is_said(
    guide_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    iad = f"--method iad --guide-from {guide_run}"
    assert "begin 1: the method has 2 epochs" in said(f"{iad} --begin 1.0", tmp_path / "never", caplog)
    caplog.clear()
    assert "never does" not in said(f"{iad} --begin 0.5", tmp_path / "late", caplog)


@pytest.fixture(scope="module")
def guide_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("guide") / "run"
    assert main(["train", "--method", "natural", "--run-dir", str(run), *TINY, "--quiet"]) == 0
    return run


@pytest.mark.parametrize(
    "flags",
    [
        "--awp 0.01 --awp-warmup 1 --bn-reset-epoch 1 --attack-bn train --bn-momentum 0.2",
        "--bn-reset-epoch 1 --burn-in 1 --epochs 3 --schedule triangular --ema 0.5 --ema-buffers copy",
        "--schedule cosine --schedule-epochs 1 --min-lr 0.001 --decay-exempt biases",
        "--method lbgat --optimizers joint",
        "--method gairat",
        "--method mail --epochs 3",
        "--method dynat --weighting mail --weight-from 0.5",
        "--method dynat",
        "--schedule triangular --schedule-by epoch --schedule-ahead 1 --min-lr 0.001",
    ],
)
def test_what_has_an_effect_is_not(flags: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = said(flags, tmp_path, caplog)
    assert "has no effect" not in text
    assert "learning rate is 0" not in text
    assert "never does" not in text


@pytest.mark.parametrize(
    ("flags", "refusal"),
    [
        (
            "--awp 0.01 --freeze *weight",
            "--awp 0.01: it perturbs weights with two dimensions or more, and none",
        ),
        ("--cutout 33", "--cutout 33: the images are 32x32 pixels, and would be mostly black"),
        ("--mixup 1 --mixup-prob 0", "--mixup has no effect: --mixup-prob 0 mixes no batch"),
        ("--early-steps 1", "--early-steps has no effect: --steps is the same"),
        (
            "--early-steps 0 --early-share 0",
            "--early-steps has no effect: --early-share 0 gives them no epoch",
        ),
        (
            "--decay-exempt 1d --weight-decay 0",
            "--decay-exempt has no effect: --weight-decay 0 decays nothing",
        ),
    ],
)
def test_what_can_do_nothing_is_refused(
    flags: str, refusal: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", "--run-dir", str(run), "--method", "madry", *TINY, *flags.split()]) == 2
    assert refusal in capsys.readouterr().err
    assert not run.exists()
