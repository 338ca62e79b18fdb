"""The benchmark scripts run, resume and store what they say."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

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


def test_loaders_measures_arrays_and_a_folder(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(8):
            pixels = np.random.default_rng(i).integers(0, 256, (9, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "train" / name / f"{i}.png")
    out = tmp_path / "out.json"
    flags = ["--json", str(out), "--data-dir", str(tmp_path), "--num-images", "40", "--batch-size", "8", "--rounds", "3"]
    subprocess.run([sys.executable, str(ROOT / "bench" / "loaders.py"), *flags], check=True, capture_output=True)
    document = json.loads(out.read_text())
    rows = document["rows"]
    assert [row["loader"].partition(",")[0] for row in rows[: len(rows) // 2]] == ["resident", "torch", "dali"][
        : len(rows) // 2
    ]
    assert {row["images"] for row in rows} == {40, 16}
    for row in rows:
        assert len(row["all_epochs"]) == 3
        assert row["images_per_s"] == sorted(row["all_epochs"])[1] > 0
    assert document["environment"]["cpu"]
