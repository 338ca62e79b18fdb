"""Inputs that once caused a traceback, a hang or a loss, by defect, with the right exit code."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from fastdynat.runs.manifest import read_manifest, write_manifest
from fuzz import odd
from fuzz.commands import COMMANDS, STARTS, TINY
from fuzz.harness import Case
from fuzz.weights import NET, REAL

RESUME, EVAL, REPORT, OVERWRITE = COMMANDS[1], COMMANDS[2], COMMANDS[4], COMMANDS[-1]
CACHED_REPORT = ["report", "run", "--no-attacks", "--num-images", "8", "--out", "rep"]
NAMED_EVAL = ["eval", "caf\udce9", "--attacks", "clean", "--num-images", "8"]
NAMED_REPORT = ["report", "caf\udce9", "--no-attacks", "--out", "rep2"]
Prepare = Callable[[Path], object]


def becomes(name: str, kind: str) -> Prepare:
    """Put another kind of file at `name`."""
    return lambda work: odd.replace_kind(work / name, kind)


def _twice(work: Path) -> None:
    path = work / "run" / "metrics.jsonl"
    path.write_text(path.read_text() * 2)


def _without_id(work: Path) -> None:
    config = work / "run" / "config.yaml"
    config.write_text(
        "".join(line for line in config.read_text().splitlines(keepends=True) if not line.startswith("# id:"))
    )
    for link in ("best", "last"):
        (work / "run" / link).unlink()


def _large_images(architecture: str) -> Prepare:
    def prepare(work: Path) -> None:
        for folder in (work / "run" / "checkpoints").iterdir():
            sidecar = folder / "model.json"
            about = json.loads(sidecar.read_text()) | {
                "image_shape": [1, 4096, 4096],
                "architecture": architecture,
            }
            sidecar.write_text(json.dumps(about))
            write_manifest(folder, read_manifest(folder).origin)

    return prepare


def _curve(work: Path) -> None:
    path = work / "rep" / "findings.json"
    stored = json.loads(path.read_text())
    stored["findings"][0]["value"]["ci"][1][0] = -(2**63)
    path.write_text(json.dumps(stored))


def _long_loss(work: Path) -> None:
    path = work / "run" / "metrics.jsonl"
    rows = [json.loads(line) | {"loss": 10**400} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _nothing(work: Path) -> None:
    pass


def _net(work: Path) -> None:
    (work / "net.py").write_text(NET)
    torch.save(REAL, work / "w.pt")


NET_EVAL = [
    "eval",
    "net.py:make",
    "--weights",
    "w.pt",
    "--data",
    "digits",
    "--num-images",
    "8",
    "--attacks",
    "clean",
    "--json",
]
KNOWN: dict[str, tuple[Prepare, list[str], int]] = {
    "pipe for a configuration": (becomes("run/config.yaml", "pipe"), RESUME, 2),
    "pipe for a configuration, report": (becomes("run/config.yaml", "pipe"), REPORT, 2),
    "pipe for the list of starts": (becomes("run/environment.json", "pipe"), RESUME, 2),
    "folder for the list of starts": (becomes("run/environment.json", "folder"), RESUME, 2),
    "pipe for the boundary's folder": (becomes("run/boundary", "pipe"), RESUME, 2),
    "link to nowhere for the boundary's folder": (becomes("run/boundary", "dangling"), RESUME, 2),
    "file for the checkpoints": (becomes("run/checkpoints", "file"), OVERWRITE, 2),
    "loop for the checkpoints": (becomes("run/checkpoints", "loop"), RESUME, 2),
    "loop for the metrics": (becomes("run/metrics.jsonl", "loop"), RESUME, 2),
    "loop for the evaluations": (becomes("run/evaluations", "loop"), [*EVAL, "--cache", "off"], 0),
    "huge state": (lambda work: os.truncate(work / "run" / "last" / "state.pt", 1 << 40), RESUME, 2),
    "huge guide, overwritten": (becomes("run/checkpoints/000002/guide.safetensors", "sparse"), OVERWRITE, 0),
    "rows twice": (_twice, RESUME, 2),
    "neither id nor links": (_without_id, RESUME, 0),
    "large images": (_large_images("small"), EVAL, 2),
    "large images, no memory": (_large_images("wrn-28-10"), EVAL, 2),
    "pipe for a report's record": (becomes("rep/.fastdynat-report.json", "pipe"), REPORT, 2),
    "huge page": (becomes("rep/index.html", "sparse"), REPORT, 2),
    "deep network": (_nothing, [*STARTS["train"], "--model", "wrn-100000-1000"], 2),
    "deep guide": (_nothing, [*STARTS["train"], "--guide", "wrn-1000000-1"], 2),
    "newline in a teacher": (_nothing, ["train", "--method", "rslad", "--guide-from", "a\nb", *TINY], 2),
    "an interval beyond any share": (_curve, CACHED_REPORT, 2),
    "a loss of 400 digits": (_long_loss, CACHED_REPORT, 2),
    "results onto the weights": (_net, [*NET_EVAL, "w.pt"], 2),
    "results onto the network's source": (_net, [*NET_EVAL, "net.py"], 2),
    "results onto a picture": (_net, [*NET_EVAL, "pictures/train/a/0.png"], 2),
    "results onto the ledger": (_nothing, [*STARTS["compare"], "--json", "cmp/ledger.json"], 2),
    "two results in one file": (_nothing, [*STARTS["compare"], "--json", "x.svg", "--chart", "x.svg"], 2),
    "bytes that are no text in an evaluation": (
        lambda work: (work / "run").rename(work / "caf\udce9"),
        NAMED_EVAL,
        0,
    ),
    "bytes that are no text in a report": (
        lambda work: (work / "run").rename(work / "caf\udce9"),
        NAMED_REPORT,
        0,
    ),
}


def known_case(name: str) -> Case:
    """The input called `name`."""
    prepare, argv, _ = KNOWN[name]

    def prepared(work: Path) -> list[str]:
        prepare(work)
        return list(argv)

    return Case("known", name, prepared)
