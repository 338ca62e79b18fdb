"""Warnings about a --config file: keys without effect, and values that no longer fit what a flag replaces."""

from pathlib import Path

import pytest

from fastdynat.commands.main import main
from fastdynat.commands.parsing.config_file_notes import config_file_notes
from fastdynat.commands.train import early_flags, parse_train
from fastdynat.config import read_config_file

TINY = ["--train-size", "32", "--val-size", "20", "--batch-size", "16", "--steps", "1", "--epochs", "1"]


def notes(file: Path, flags: str = "") -> list[str]:
    argv = ["--config", str(file), *flags.split()]
    parsed = parse_train(argv, early_flags(argv))
    return [*config_file_notes(str(file), read_config_file(file), parsed.command.train, parsed.given)]


def written(folder: Path, text: str) -> Path:
    (folder / "my.yaml").write_text(text)
    return folder / "my.yaml"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration that a run has stored."""
    run = tmp_path_factory.mktemp("stored") / "run"
    flags = ["--method", "madry", "--schedule", "cosine", "--eps", "8/255", *TINY, "--quiet"]
    assert main(["train", *flags, "--run-dir", str(run)]) == 0
    return run / "config.yaml"


def test_keys_without_effect_are_named_once(tmp_path: Path) -> None:
    text = (
        "method: madry\nmilestones: [0.3, 0.6]\nremode: const\nearly_share: 0.2\nextra_share: 0.3\nlr: 0.05\n"
    )
    (note,) = notes(written(tmp_path, text))
    assert note == (
        f"--config {tmp_path / 'my.yaml'}: without effect: milestones (--schedule release has none; it is "
        "for --schedule multistep), remode (needs --reprob), early_share (needs --early-steps), extra_share "
        "(needs --extra-data)"
    )
    assert not notes(written(tmp_path, "method: madry\nmilestones: [0.3, 0.6]\nschedule: multistep\n"))
    assert not notes(written(tmp_path, "method: madry\nextra_share: 0.7\n"))  # the default


def test_the_stored_configuration_of_a_run_causes_no_warning(stored: Path) -> None:
    assert not notes(stored)
    assert not notes(stored, "--schedule release --lr 0.05 --seed 3")


def test_values_that_fitted_what_a_flag_replaces_are_named(stored: Path, tmp_path: Path) -> None:
    (note,) = notes(stored, "--eps 4/255")
    assert note.startswith(
        f"--eps 4/255 replaces {8 / 255} of {stored}, which still sets step_size {2 / 255} and eval_eps "
    )
    assert note.endswith("give --step-size, --eval-eps, or remove them from the file for the usual values")
    (note,) = notes(stored, "--eps 4/255 --step-size 1/255")
    assert f"which still sets eval_eps {8 / 255}; give --eval-eps, or" in note
    assert not notes(stored, "--eps 4/255 --step-size auto --eval-eps auto")
    (note,) = notes(stored, "--opt adamw")
    assert "--opt adamw replaces sgd of" in note
    assert "still sets lr 0.03 and weight_decay 0.0002; give" in note
    assert not notes(stored, "--opt adamw --lr 0.001 --weight-decay 0.05")
    assert not notes(written(tmp_path, "method: madry\neps: 8/255\nopt: sgd\n"), "--eps 4/255 --opt adamw")


def test_a_run_says_the_warnings(tmp_path: Path, messages: list[str]) -> None:
    file = written(tmp_path, "method: madry\nremode: const\neps: 8/255\nstep_size: 2/255\n")
    run = ["train", "--config", str(file), "--run-dir", str(tmp_path / "run"), *TINY, "--quiet"]
    assert main([*run, "--eps", "4/255"]) == 0
    assert sum("without effect: remode (needs --reprob)" in message for message in messages) == 1
    assert sum("still sets step_size 2/255; give" in message for message in messages) == 1
