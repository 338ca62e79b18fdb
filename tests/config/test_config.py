"""Configuration: flat unique names; files and flags agree; a stored configuration reads back unchanged."""

import dataclasses
from pathlib import Path

import pytest

from fastdynat.commands.main import main
from fastdynat.config import GROUPS, override, read_config_file, to_flat, to_yaml
from fastdynat.methods import METHODS
from fastdynat.methods.configs import default_config, stored_config

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


@pytest.mark.parametrize("method", METHODS)
def test_every_flag_has_one_name_and_a_help_text(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = default_config(method)
    names = [f.name for group in (*GROUPS, "options") for f in dataclasses.fields(getattr(config, group))]
    assert len(names) == len(set(names))
    with pytest.raises(SystemExit) as stop:
        main(["train", "--method", method, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in text for name in names)


@pytest.mark.parametrize("method", METHODS)
def test_yaml_round_trip(method: str, tmp_path: Path) -> None:
    config = default_config(method)
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert override(default_config(method), read_config_file(tmp_path / "c.yaml"), "x") == config


def test_flags_win_over_the_file_and_both_are_resolved_and_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "method: madry\neps: 8\nlr: 1e-3\namp: off\nmilestones: [0.3, 0.6]\nstart: none\nseed: 3\n"
    )
    run = tmp_path / "run"
    flags = [flag for flag in TINY if flag != "--quiet"]
    assert main(["train", "--config", str(file), "--run-dir", str(run), *flags, "--seed", "4"]) == 0
    assert "eps 8.0 is read as 8/255 = 0.0313725" in capsys.readouterr().err
    flat = to_flat(stored_config(run))
    expected = {
        "method": "madry",
        "eps": 8 / 255,
        "step_size": 2 / 255,
        "lr": 1e-3,
        "seed": 4,
        "start": "none",
        "amp": "off",
    }
    assert {key: flat[key] for key in expected} == expected
    assert (flat["model"], flat["guide"], flat["augment"], flat["device"] in ("cpu", "cuda")) == (
        "small",
        "none",
        "none",
        True,
    )
    # The stored configuration is itself a configuration file.
    assert (
        main(["train", "--config", str(run / "config.yaml"), "--run-dir", str(tmp_path / "again"), "--quiet"])
        == 0
    )
    again = to_flat(stored_config(tmp_path / "again"))
    assert {k: v for k, v in again.items() if k != "run_dir"} == {
        k: v for k, v in flat.items() if k not in ("run_dir",)
    } | {"quiet": True}


def test_published_radius_is_evaluated_at_8_255(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["train", "--run-dir", str(run), *TINY, "--eps", "0.031"]) == 0
    flat = to_flat(stored_config(run))
    assert (flat["eps"], flat["step_size"], flat["eval_eps"], flat["start"]) == (
        0.031,
        0.007,
        8 / 255,
        "gaussian",
    )


@pytest.mark.parametrize(("schedule", "warmup"), [("onecycle", 0.3), ("triangular", 0.5), ("release", None)])
def test_the_usual_warm_up_is_filled_in(schedule: str, warmup: float | None, tmp_path: Path) -> None:
    assert (
        main(
            [
                "train",
                "--run-dir",
                str(tmp_path / "run"),
                *TINY,
                "--method",
                "natural",
                "--schedule",
                schedule,
            ]
        )
        == 0
    )
    assert to_flat(stored_config(tmp_path / "run"))["warmup"] == warmup


def test_a_new_run_directory_is_made_for_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["train", *TINY, "--method", "natural"]) == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["digits-natural", "digits-natural-2"]


def test_help_version_and_module_entry(capsys: pytest.CaptureFixture[str]) -> None:
    from fastdynat import __version__

    assert main([]) == 0
    assert main(["--version"]) == 0
    out = capsys.readouterr().out
    assert "eval" in out
    assert out.endswith(__version__ + "\n")
