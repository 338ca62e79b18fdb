"""README.md says what is there: its commands parse, its flags exist, its test command is the one CI runs."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from fastdynat.attacks import parse_attacks
from fastdynat.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def flags_of(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))


def test_every_flag_of_every_command_in_the_readme_exists(capsys: pytest.CaptureFixture[str]) -> None:
    known = {command: flags_of(command, capsys) for command in ("train", "eval", "doctor")}
    uses = [line for block in re.findall(r"```.*?\n(.*?)```", README, re.S) for line in re.split(r"\n|&&", block)]
    commands = [shlex.split(use.split(" #")[0].rstrip("\\ ")) for use in uses if use.strip().startswith("fastdynat ")]
    assert len(commands) > 5
    for _, command, *arguments in commands:
        assert {a.partition("=")[0] for a in arguments if a.startswith("--")} <= known[command], arguments
        if "--attacks" in arguments:
            parse_attacks(arguments[arguments.index("--attacks") + 1], eps=0.1, step_size=0.1)


def test_ci_runs_the_readmes_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    extract = next(line for line in script.splitlines() if line.startswith("command="))
    found = subprocess.run(["bash", "-c", f'{extract}; echo "$command"'], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.startswith("python3 -m venv .venv")
    assert found.stdout.strip().endswith("pytest")
    assert found.stdout.strip() in README
