"""bench/scaling.py and bench/scaling_model.py: what is counted, and the arithmetic of the prediction."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import ROOT

from fastdynat.distributed import world
from fastdynat.distributed.flat import flat_sum


def script(name: str) -> ModuleType:
    """bench/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "bench" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


MODEL = script("scaling_model")
STORED: dict[str, Any] = json.loads((ROOT / "bench" / "results" / "scaling_model.json").read_text())


def test_an_all_reduce_takes_the_time_of_its_slowest_link() -> None:
    size = 360e6
    inside = 2 * size * 7 / 8 / (0.8 * 450e9)
    assert MODEL.all_reduce(size, 8) == pytest.approx(25e-6 + inside)
    between = 2 * size * 63 / 64 / (8 * 0.8 * 50e9)
    assert between > 2 * size * 63 / 64 / (0.8 * 450e9)
    assert MODEL.all_reduce(size, 64) == pytest.approx(60e-6 + between)


def test_the_stored_prediction_is_what_is_counted_now() -> None:
    (case,) = [case for case in MODEL.CASES if case.model == "resnet18"]
    found = MODEL.rounded(MODEL.predict(case, 128, 8))
    (row,) = [row for row in STORED["rows"] if (row["network"], row["gpus"]) == ("ResNet-18", 8)][:1]
    assert found == row
    assert row["bytes_per_gpu"] == round(2 * 4 * row["parameters"] * 7 / 8)


def test_the_prediction_is_called_one() -> None:
    assert STORED["measured"] is False
    for row in STORED["rows"]:
        assert row["kept_by_communication"]["apart"] <= row["kept_by_communication"]["overlapped"] < 1
        assert row["efficiency"]["apart"] <= row["kept_by_communication"]["apart"] + 1e-3


def _counted(module: str) -> tuple[dict[str, int], dict[str, int]]:
    mode = script(module).count_collectives()
    with mode:
        flat_sum([torch.ones(3, 4), torch.ones(5), torch.ones(2, dtype=torch.float64)], world())
        world().sum_(torch.ones(1))
    return dict(mode.calls), dict(mode.bytes)


def test_collectives_are_counted_with_their_bytes(ranks: Callable[[int], Any]) -> None:
    calls = {"allreduce float32": 2, "allreduce float64": 1}
    for found in ranks(2)(_counted, "scaling"):
        assert found == (calls, {"allreduce float32": 4 * 18, "allreduce float64": 16})


def test_rows_of_one_and_two_processes(tmp_path: Path) -> None:
    out = tmp_path / "scaling.json"
    flags = ["--model", "small", "--method", "madry", "--batch-size", "8", "--steps", "1", "--rounds", "2"]
    command = [
        sys.executable,
        str(ROOT / "bench" / "scaling.py"),
        *flags,
        "--warm-up",
        "0",
        "--json",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    (case,) = document["cases"]
    rows = {(row["processes"], row["threads_of_each"]): row for row in case["rows"]}
    assert list(rows) == [(1, 1), (1, 2), (2, 1)]
    assert rows[1, 1]["bytes_handed_over"] == 0
    two = rows[2, 1]
    assert two["beside_threads"] == pytest.approx(two["images_per_s"] / rows[1, 2]["images_per_s"], abs=1e-3)
    assert two["ideal_bytes_sent"] == two["trained_bytes"] == two["ideal_bytes_handed_over"]
    # Every gradient once, and beside them little: running statistics.
    assert 1 <= two["share_of_ideal"] < 1.05
    assert document["environment"]["processor_flags"] or document["environment"]["cpu"]
