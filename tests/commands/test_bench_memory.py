"""The memory comparison of `fastdynat bench --grad-checkpointing`: printed, and stored."""

import json
from pathlib import Path

import pytest

from fastdynat.commands.main import main


def test_peaks_are_measured_in_processes_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    flags = ["--method", "natural", "--model", "wrn-10-1", "--data", "cifar10", "--batch-size", "8"]
    flags += ["--grad-checkpointing", "--repeats", "1", "--seconds", "0.01", "--json", str(out)]
    assert main(["bench", *flags]) == 0
    doc = json.loads(out.read_text())
    found = doc["checkpointing"]
    assert all(found[key]["peak_bytes"] > 0 and found[key]["seconds"] > 0 for key in ("with", "without"))
    assert {row["name"] for row in doc["rows"] if row["switch"]} == {"grad-checkpointing off"}
    printed = capsys.readouterr().out
    assert "--grad-checkpointing: peak memory of a step" in printed
    assert "predicted" not in printed
