"""The benchmark scripts run, resume and store what they say."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import needs
from PIL import Image

ROOT = Path(__file__).parents[2]


def test_loaders_measures_arrays_and_a_folder(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(8):
            pixels = np.random.default_rng(i).integers(0, 256, (9, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "train" / name / f"{i}.png")
    out = tmp_path / "out.json"
    flags = [
        "--json",
        str(out),
        "--data-dir",
        str(tmp_path),
        "--num-images",
        "40",
        "--batch-size",
        "8",
        "--rounds",
        "3",
    ]
    subprocess.run(
        [sys.executable, str(ROOT / "bench" / "loaders.py"), *flags], check=True, capture_output=True
    )
    document = json.loads(out.read_text())
    rows = document["rows"]
    assert [row["loader"].partition(",")[0] for row in rows[: len(rows) // 2]] == [
        "resident",
        "torch",
        "dali",
    ][: len(rows) // 2]
    assert {row["images"] for row in rows} == {40, 16}
    for row in rows:
        assert len(row["all_epochs"]) == 3
        assert row["images_per_s"] == sorted(row["all_epochs"])[1] > 0
    assert document["environment"]["cpu"]


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "bench").glob("*.sh")))
def test_scripts_parse(script: str) -> None:
    path = str(ROOT / "bench" / script)
    for command in (["bash", "-n", path], ["shellcheck", path]):
        if shutil.which(command[0]):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@needs("pytest_benchmark")
def test_steps_can_be_tracked(tmp_path: Path) -> None:
    out = tmp_path / "steps.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(ROOT / "bench" / "test_steps.py"),
        "-q",
        f"--benchmark-json={out}",
    ]
    env = os.environ | {"FASTDYNAT_BENCH_DEVICE": "cpu", "FASTDYNAT_BENCH_MODEL": "small"}
    subprocess.run(
        [*command, "-p", "no:cacheprovider", f"--rootdir={ROOT / 'bench'}"], env=env, check=True, cwd=tmp_path
    )
    assert len(json.loads(out.read_text())["benchmarks"]) == 4
