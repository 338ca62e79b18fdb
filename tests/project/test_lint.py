"""The code is clean under ruff and mypy, and says which GPU it means."""

import ast
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


OF_THE_CURRENT_DEVICE = ("torch.cuda.current_stream", "torch.cuda.synchronize")


def meaning_the_current_device(source: str) -> list[int]:
    """Lines of calls that mean the process's current GPU, which need not be that of --device cuda:N."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    bare = [call for call in calls if not call.args and not call.keywords]
    return [
        call.lineno
        for call in bare
        if (name := ast.unparse(call.func)) in OF_THE_CURRENT_DEVICE or name.endswith(".record")
    ]


def test_streams_and_events_are_of_a_named_device() -> None:
    assert meaning_the_current_device("torch.cuda.current_stream()\nx.record(stream)\nx.record()") == [1, 3]
    assert meaning_the_current_device("torch.cuda.synchronize(device)\nevent.synchronize()") == []
    found = {
        str(path.relative_to(ROOT)): lines
        for path in (ROOT / "fastdynat").rglob("*.py")
        if (lines := meaning_the_current_device(path.read_text()))
    }
    assert found == {}
