"""kill -9 at random moments: every resumed run ends with the weights of the uninterrupted one."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

KILLS = 20
# Saved every 0.3 s inside epochs too, so that many kills fall into a save.
FLAGS = [
    "--train-size",
    "256",
    "--val-size",
    "20",
    "--batch-size",
    "32",
    "--steps",
    "3",
    "--epochs",
    "60",
    "--save-every",
    "0.005",
]


def start(run: Path) -> "subprocess.Popen[str]":
    argv = ["--resume", str(run)] if (run / "config.yaml").exists() else ["--run-dir", str(run), *FLAGS]
    command = [sys.executable, "-m", "fastdynat", "train", *argv]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_WAIT_POLICY": "passive"}
    )


def wait_for(process: "subprocess.Popen[str]", text: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if text in line:
            return
    pytest.fail(f"the run ended without saying {text!r}")


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    begin = time.perf_counter()
    process = start(whole)
    wait_for(process, "run directory")
    process.communicate()
    assert process.returncode == 0
    # Moments are drawn so that the kills together use about half of the uninterrupted run.
    longest = (time.perf_counter() - begin) / KILLS
    rng = random.Random(2408)
    for _ in range(KILLS):
        process = start(parts)
        wait_for(process, "run directory")
        time.sleep(rng.uniform(0, longest))
        assert process.poll() is None, "the run ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = start(parts)
    assert process.communicate()[1]
    assert process.returncode == 0
    for name in ("model", "guide"):
        for link in ("best", "last"):
            left, right = (load_file(run / link / f"{name}.safetensors") for run in (whole, parts))
            assert all(torch.equal(left[key], right[key]) for key in left), f"{link}/{name}"
    assert (parts / "metrics.jsonl").read_text().count("\n") == 60
