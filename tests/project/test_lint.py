"""The code is clean under ruff and mypy."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import needs

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["ruff", "check", "."], marks=needs("ruff")),
        pytest.param(["ruff", "format", "--check", "."], marks=needs("ruff")),
        pytest.param(["mypy"], marks=needs("mypy")),
    ],
    ids=" ".join,
)
def test_clean(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
