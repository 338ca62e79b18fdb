"""The benchmark scripts run, resume and store what they say."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TINY = ["--train-size", "40", "--val-size", "20", "--batch-size", "20", "--steps", "1", "--epochs", "1", "--quiet"]


def test_controls_trains_three_methods_and_resumes_what_is_there(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, str(ROOT / "bench" / "controls.py"), "--runs", str(tmp_path / "runs"), "--json", str(out)]
    for resumed in (False, True):
        subprocess.run([*command, "--attacks", "clean,fgsm", *TINY], check=True, cwd=tmp_path, capture_output=True)
        document = json.loads(out.read_text())
        assert [(r["method"], r["checkpoint"]) for r in document["results"]] == [
            (method, checkpoint) for method in ("natural", "madry", "dynat") for checkpoint in ("best", "last")
        ]
        assert all(("--resume" in c["command"]) is resumed for c in document["commands"][:3])
        assert document["commit"]
        assert document["environment"]["cpu"]
        assert [len(c["epochs"]) for c in document["commands"][:3]] == [1, 1, 1]
