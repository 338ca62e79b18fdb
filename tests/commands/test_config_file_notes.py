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


def test_the_stored_configuration_of_an_earlier_version_causes_no_warning(
    stored: Path, tmp_path: Path
) -> None:
    """It lacks the keys that are new since then; its keys without effect are still not the user's choice."""
    lines = stored.read_text().splitlines()
    older = "\n".join(line for line in lines if not line.startswith("norm_choice:"))
    older = older.replace("remode: pixel", "remode: const")
    assert "\nremode: const\n" in older
    assert not notes(written(tmp_path, older))
    (note,) = notes(written(tmp_path, older.partition("\n")[2]))  # nobody's but the user's
    assert "remode (needs --reprob)" in note


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("8/255", "8"),
        ("8", "8/255"),
        (repr(8 / 255), "8/255"),
        ("0.1", "1/10"),
        ("auto", "auto"),
        ("0.5\nnorm: l2", "1/2"),
        ("8\nnorm: l2", "8"),
    ],
)
def test_a_radius_that_is_only_written_differently_is_not_replaced(
    before: str, now: str, tmp_path: Path
) -> None:
    file = written(tmp_path, f"method: madry\neps: {before}\nstep_size: 0.01\neval_eps: 0.03\n")
    assert not notes(file, f"--eps {now}")


@pytest.mark.parametrize(
    ("before", "now"),
    [("8/255", "9/255"), ("8", "auto"), ("auto", "8/255"), ("-1", "8/255"), ("8/255", "0.0314")],
)
def test_another_radius_is_replaced(before: str, now: str, tmp_path: Path) -> None:
    file = written(tmp_path, f"method: madry\neps: {before}\nstep_size: 0.01\neval_eps: 0.03\n")
    (note,) = notes(file, f"--eps {now}")
    assert f"--eps {now} replaces {before} of {file}, which still sets step_size 0.01 and" in note


def test_values_that_fitted_two_replaced_ones_are_named_once(stored: Path) -> None:
    (note,) = notes(stored, "--norm l2 --eps 0.5")
    assert note.startswith(
        f"--eps 0.5 replaces {8 / 255} and --norm l2 replaces linf of {stored}, which still sets step_size "
    )
    first, second = notes(stored, "--norm l2 --opt adamw")
    assert "--norm l2 replaces linf of" in first
    assert "--opt adamw replaces sgd of" in second


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
