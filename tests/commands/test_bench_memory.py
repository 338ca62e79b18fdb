"""The memory comparison of `fastdynat bench --grad-checkpointing`: printed, and stored."""

import json
from pathlib import Path

import pytest

from fastdynat.commands.bench import step_memory
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


def test_the_step_that_was_asked_for_is_compared_and_not_the_uncompiled_one_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --peers, the rows have both."""
    monkeypatch.setattr(step_memory, "peak_of_process", lambda config, info: 1)
    out = tmp_path / "bench.json"
    flags = ["--method", "dynat", "--model", "wrn-10-1", "--guide", "wrn-10-1", "--data", "cifar10"]
    flags += ["--batch-size", "8", "--steps", "1", "--amp", "bf16", "--compile", "off", "--device", "cpu"]
    flags += ["--peers", "--grad-checkpointing", "--repeats", "1", "--seconds", "0.01", "--json", str(out)]
    assert main(["bench", *flags]) == 0
    doc = json.loads(out.read_text())
    steps = [row for row in doc["rows"] if row["kind"] == "step" and row["ours"] and not row["switch"]]
    assert [row["precision"] for row in steps] == ["fp32", "bf16"]
    seconds = [row["seconds"]["median"] for row in steps]
    assert doc["checkpointing"]["with"]["seconds"] == pytest.approx(seconds[1], rel=1e-4)
