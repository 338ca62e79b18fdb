"""Equality of two runs, bit for bit."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

UNTIMED = {"train_seconds", "images_per_s"}


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, optimiser, averages and metrics to the last bit."""
    for link in ("last", "best"):
        files = sorted(p.name for p in (a / link).glob("*.safetensors"))
        assert files == sorted(p.name for p in (b / link).glob("*.safetensors"))
        for name in files:
            left, right = load_file(a / link / name), load_file(b / link / name)
            assert all(torch.equal(left[key], right[key]) for key in left), f"{link}/{name}"
    left, right = (torch.load(run / "last" / "state.pt", weights_only=True) for run in (a, b))
    for one, other in zip(left["optimizers"], right["optimizers"], strict=True):
        for key, kept in one["state"].items():
            assert kept.keys() == other["state"][key].keys()
            assert all(torch.equal(value, other["state"][key][name]) for name, value in kept.items())
    assert torch.equal(left["rng"]["torch"], right["rng"]["torch"])
    assert left["scaler"] == right["scaler"]
    strip = [[{k: v for k, v in row.items() if k not in UNTIMED} for row in rows(run)] for run in (a, b)]
    assert strip[0] == strip[1]
