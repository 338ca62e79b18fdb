"""README.md says what is there: its commands parse, its flags exist, its test command is the one CI runs."""

import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastdynat.commands.evaluate.columns import parse_columns
from fastdynat.commands.main import main
from fastdynat.methods import METHODS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def flags_of(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))


def test_every_flag_of_every_command_in_the_readme_exists(capsys: pytest.CaptureFixture[str]) -> None:
    known = {
        command: flags_of(command, capsys)
        for command in (
            "train",
            "eval",
            "compare",
            "export",
            "report",
            "boundary",
            "recipes",
            "bench",
            "doctor",
        )
    }
    uses = [
        line for block in re.findall(r"```.*?\n(.*?)```", README, re.S) for line in re.split(r"\n|&&", block)
    ]
    commands = [
        shlex.split(use.split(" #")[0].rstrip("\\ ")) for use in uses if use.strip().startswith("fastdynat ")
    ]
    assert len(commands) > 5
    for _, command, *arguments in commands:
        assert {a.partition("=")[0] for a in arguments if a.startswith("--")} <= known[command], arguments
        if "--attacks" in arguments:
            parse_columns(
                arguments[arguments.index("--attacks") + 1], eps=0.1, step_size=0.1, norm="linf", amp="off"
            )


def test_the_example_method_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's method, as it stands there; without its own term it is Madry's."""
    code = next(
        block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "class Squeeze" in block
    )
    # tyro reads help texts from a class's source, so the example lies in a file.
    (tmp_path / "squeeze_example.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(METHODS, "squeeze", importlib.import_module("squeeze_example").Squeeze)
    tiny = [
        "--train-size",
        "60",
        "--val-size",
        "20",
        "--batch-size",
        "20",
        "--steps",
        "1",
        "--epochs",
        "2",
        "--quiet",
    ]
    for method, flags in (("squeeze", ["--squeeze-weight", "0"]), ("madry", [])):
        assert main(["train", "--method", method, "--run-dir", str(tmp_path / method), *tiny, *flags]) == 0
    left, right = (
        load_file(tmp_path / method / "last" / "model.safetensors") for method in ("squeeze", "madry")
    )
    learned = [key for key in left if key.endswith(("weight", "bias"))]
    assert learned
    for key in learned:
        torch.testing.assert_close(left[key], right[key], rtol=0, atol=1e-5, msg=key)


def test_ci_runs_the_readmes_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    extract = next(line for line in script.splitlines() if line.startswith("command="))
    found = subprocess.run(
        ["bash", "-c", f'{extract}; echo "$command"'], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.startswith("python3 -m venv .venv")
    assert found.stdout.strip().endswith("pytest -n 2 --dist loadfile")
    assert found.stdout.strip() in README


def test_the_evaluation_names_of_the_readme_exist() -> None:
    section = README.partition("## Evaluation")[2].partition("## What a run leaves")[0]
    line = section.partition("`fastdynat.evaluation` also has ")[2].partition(";")[0]
    names = re.findall(r"`(\w+)`", line)
    assert len(names) >= 5
    evaluation = importlib.import_module("fastdynat.evaluation")
    assert [name for name in names if not callable(getattr(evaluation, name, None))] == []
