"""bench/studies from end to end on made-up images: a killed runner goes on; results, chart and tables."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT

from fastdynat.commands.main import main

STUDIES = str(ROOT / "bench" / "studies")
CHANGED = {"val-size": "20", "train-size": "80", "batch-size": "16", "steps": "1", "val-every": "1"}
EPOCHS = 5
RUNNER = """
import sys
sys.path[:0] = [sys.argv[1]]
from pathlib import Path
from claim_runs import Work, run_all
work = Work(Path(sys.argv[2]), sys.argv[3], epochs=int(sys.argv[4]), changed=eval(sys.argv[5]))
run_all(work, limit=1)
"""


@pytest.fixture(scope="module")
def claim() -> Iterator[SimpleNamespace]:
    """The modules of the study; bench/ comes last on the path, because it has its own autoattack.py."""
    added = [STUDIES, str(ROOT / "bench"), str(ROOT / "docs" / "hooks")]
    sys.path += added
    try:
        names = (
            "claim_design",
            "claim_runs",
            "claim_results",
            "claim_tables",
            "claim_follow_up",
            "make_image_folder",
        )
        yield SimpleNamespace(**{name: import_module(name) for name in names})
    finally:
        for path in added:
            sys.path.remove(path)


@pytest.fixture
def images(claim: SimpleNamespace, tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    claim.make_image_folder.make_image_folder(folder, train=120, val=24, classes=4, size=32)
    return folder


def here(work: Any, lock: int, name: str, arguments: list[str]) -> tuple[int, str]:
    """In place of a process of its own, which takes seconds to start."""
    return main(arguments), ""


def test_a_killed_study_goes_on_to_the_results_of_one_that_was_not(
    claim: SimpleNamespace, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    arguments = [STUDIES, str(killed), str(images), str(EPOCHS), repr(CHANGED)]
    log = killed / "runs" / claim.claim_design.RUNS[0].name / "metrics.jsonl"
    with subprocess.Popen([sys.executable, "-c", RUNNER, *arguments], start_new_session=True) as runner:
        until = time.monotonic() + 600
        while not (log.exists() and log.read_text()) and time.monotonic() < until and runner.poll() is None:
            time.sleep(0.01)
        os.killpg(runner.pid, signal.SIGKILL)
    before = len(log.read_text().splitlines())
    monkeypatch.setattr(claim.claim_runs, "command", here)
    monkeypatch.setattr(claim.claim_runs, "measurements", lambda run: ("pgd20",))
    works = [
        claim.claim_runs.Work(folder, str(images), epochs=EPOCHS, changed=CHANGED)
        for folder in (killed, whole)
    ]
    with claim.claim_runs.claimed(works[0], claim.claim_design.RUNS[0].name, wait=True):
        pass  # the training that was killed has ended
    assert [claim.claim_runs.run_all(work, limit=2) for work in works] == [2, 2]
    assert 1 <= before < EPOCHS
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, EPOCHS + 1))
    first, second = (claim.claim_results.collect(work) for work in works)
    assert [run["test"] for run in first["runs"].values()] == [run["test"] for run in second["runs"].values()]
    losses = [[run["log"]["loss"] for run in found["runs"].values()] for found in (first, second)]
    assert losses[0] == losses[1]


def test_what_is_collected_is_shown(
    claim: SimpleNamespace, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim.claim_runs, "command", here)
    run = claim.claim_design.RUNS[1]
    measured = {True: ("pgd20", "autoattack"), False: ("pgd20",)}
    monkeypatch.setattr(claim.claim_runs, "measurements", lambda one: measured[one == run])
    monkeypatch.setattr(claim.claim_runs, "source_commit", lambda: "abc")
    work = claim.claim_runs.Work(
        tmp_path / "work", str(images), epochs=1, autoattack_images=2, changed=CHANGED
    )
    assert claim.claim_runs.run_all(work, limit=2) == 2
    assert claim.claim_runs.run_all(work, until=0.0) == 0
    target = tmp_path / "stored.json"
    claim.claim_results.write_collected(work, target)
    document = json.loads(target.read_text())
    assert list(document["runs"]) == [run.name for run in claim.claim_design.RUNS[:2]]
    stored = document["runs"][run.name]
    pgd = stored["test"]["last"]["pgd20"]
    (found,) = claim.claim_results.bits_of(
        {run.name: stored | {"test": {"last": stored["test"]["last"]}}}, "crop-flip"
    ).values()
    assert found.sum() == round(pgd["accuracy"] * pgd["images"])
    assert set(stored["labels"]) == {"best", "last"}
    assert 0 <= stored["labels"]["last"]["train"]["agreement"] <= 1
    assert "val_pgd10_acc" in stored["log"]
    assert (stored["made"]["commit"], stored["made"]["torch"]) == ("abc", torch.__version__)
    assert target.with_suffix(".svg").read_text().count("dynamic label = true label") == 2
    monkeypatch.setattr(claim.claim_tables, "read", lambda name: document)
    tables = {name: draw() for name, (draw, _) in claim.claim_tables.TABLES.items()}
    assert tables["claim-progress"].startswith("**2 of 40 runs so far.**")
    assert "| methods | DYNAT | 1 | 1 |" in tables["claim-accuracies"]
    assert "not enough runs yet" in tables["claim-findings"]
    assert "| methods | DYNAT | 1 | last |" in tables["claim-labels"]
    assert "| DYNAT | 1 | best |" in tables["claim-robust"]

    assert tables["claim-follow-up"] == "Not run yet."

    # What the results asked for is kept apart from the plan's runs.
    follow_up = claim.claim_follow_up.FOLLOW_UP.runs
    assert claim.claim_runs.run_all(work, limit=1, runs=follow_up) == 1
    claim.claim_results.write_collected(work, target)
    document = json.loads(target.read_text())
    assert list(document["runs"]) == [run.name for run in claim.claim_design.RUNS[:2]]
    assert list(document["follow_up"]["runs"]) == [follow_up[0].name]
    assert {found["seeds"] for found in document["follow_up"]["findings"]} == {1}
    assert "| 1 |" in claim.claim_tables.follow_up()

    # On another machine, without the weights: what the file has is not made again, and stays in it.
    moved = replace(work, folder=tmp_path / "moved", earlier=claim.claim_results.read_collected(target))
    monkeypatch.setattr(claim.claim_runs, "source_commit", lambda: "def")
    assert claim.claim_runs.run_all(moved, limit=1) == 1
    claim.claim_results.write_collected(moved, target)
    again = json.loads(target.read_text())["runs"]
    assert list(again) == [run.name for run in claim.claim_design.RUNS[:3]]
    assert [made["made"]["commit"] for made in again.values()] == ["abc", "abc", "def"]
    assert again[run.name] == stored
    # A run without all its measurements is made again.
    del again[run.name]["robust"]
    half = replace(moved, earlier={"runs": again})
    assert [half.made_earlier(run) for run in claim.claim_design.RUNS[:3]] == [True, False, True]
    # Until then it is kept, and what is complete is not replaced by less.
    assert claim.claim_results.collect(half)["runs"].keys() == again.keys()
    work.result(run, "autoattack").unlink()
    kept = claim.claim_results.collect(replace(work, earlier={"runs": {run.name: stored}}))["runs"]
    assert kept[run.name] == stored


def test_runners_share_the_work(
    claim: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs that another runner holds come last; after one that was killed they are made."""
    made: list[str] = []
    monkeypatch.setattr(claim.claim_runs, "make", lambda work, lock, run: made.append(run.name))
    work = claim.claim_runs.Work(tmp_path, "images")
    runs = claim.claim_design.RUNS
    first, guide = runs[0], claim.claim_design.Run("guide", 1)
    before = claim.claim_design.Run("guide-before", 1)
    others = [run for run in runs if run not in (first, guide, before)]
    runner = threading.Thread(target=claim.claim_runs.run_all, args=(work,))
    with claim.claim_runs.claimed(work, first.name) as lock, claim.claim_runs.claimed(work, guide.name):
        assert lock is not None
        with claim.claim_runs.claimed(work, first.name) as taken:
            assert taken is None
        runner.start()
        runner.join(2)
        assert made == [run.name for run in others]
    runner.join(30)
    assert made == [run.name for run in (*others, first, guide, before)]


def test_a_run_waits_for_the_guide_that_it_starts_from(
    claim: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[str] = []

    def command(work: Any, lock: int, name: str, arguments: list[str]) -> tuple[int, str]:
        commands.append(f"{arguments[0]} {name}")
        if arguments[0] == "eval":
            Path(arguments[arguments.index("--json") + 1]).write_text("{}")
        return 0, ""

    monkeypatch.setattr(claim.claim_runs, "command", command)
    work = claim.claim_runs.Work(tmp_path, "images")
    guide, run = (claim.claim_design.Run(arm, 1) for arm in ("guide", "guide-before"))
    maker = threading.Thread(target=claim.claim_runs.make, args=(work, 0, run))
    with claim.claim_runs.claimed(work, guide.name):
        maker.start()
        maker.join(0.3)
        assert not commands
    maker.join(30)
    assert commands == [f"train {guide.name}", f"train {run.name}", f"eval {run.name}"]


def test_the_cost_is_measured_once(
    claim: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter(range(1, 100))
    monkeypatch.setattr(claim.claim_runs, "one_epoch", lambda work, lock, run: float(next(seconds)))
    work = claim.claim_runs.Work(tmp_path, "images")
    # Rounds of four methods: 1, 5, 9, 13, 17 are Madry's.
    cost = {"madry": 9.0, "dynat": 10.0, "trades": 11.0, "lbgat": 12.0}
    assert claim.claim_runs.measure_cost(work) == cost
    assert claim.claim_runs.measure_cost(work) == cost
    assert next(seconds) == 21
    moved = replace(work, folder=tmp_path / "moved", earlier={"cost": {"median": cost}})
    assert claim.claim_runs.measure_cost(moved) == cost
    assert next(seconds) == 22


@pytest.mark.parametrize(
    ("status", "said", "evaluated"),
    [(0, "done", True), (1, "training diverged: loss is nan in epoch 3", True), (1, "no space left", False)],
)
def test_a_run_that_diverges_counts_and_one_that_fails_is_left(
    claim: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    status: int,
    said: str,
    evaluated: bool,
) -> None:
    commands = []

    def command(work: Any, lock: int, name: str, arguments: list[str]) -> tuple[int, str]:
        commands.append((arguments[0], name))
        if arguments[0] == "eval":
            Path(arguments[arguments.index("--json") + 1]).write_text("{}")
        return (status, f"...\n{said}") if arguments[0] == "train" else (0, "")

    monkeypatch.setattr(claim.claim_runs, "command", command)
    runs = claim.claim_design.BLOCKS[0].runs
    work = claim.claim_runs.Work(tmp_path, "images")
    assert claim.claim_runs.run_all(work, runs=runs) == (len(runs) if evaluated else 0)
    # All runs have their turn, whatever happens to the first.
    assert [name for kind, name in commands if kind == "train"] == [run.name for run in runs]
    assert work.made_here(runs[0]) == evaluated
    assert (f"{runs[0].name} failed: {said}" in capsys.readouterr().out) != evaluated


def test_a_command_that_is_stopped_stops_the_study(claim: SimpleNamespace) -> None:
    for status in (-9, -2, 130):
        with pytest.raises(KeyboardInterrupt):
            claim.claim_runs.check(status, "")


def test_a_command_leaves_its_messages_and_its_cost(claim: SimpleNamespace, tmp_path: Path) -> None:
    work = claim.claim_runs.Work(tmp_path, "images")
    with claim.claim_runs.claimed(work, "run") as lock:
        status, said = claim.claim_runs.command(work, lock, "run", ["train", "--no-such-flag"])
    assert status == 2
    assert "--no-such-flag" in said
    (row,) = [json.loads(line) for line in (tmp_path / "segments.jsonl").read_text().splitlines()]
    assert (row["name"], row["command"], row["code"]) == ("run", "train", 2)
    assert row["cpu_seconds"] > 0


def test_the_median_distance_is_that_of_the_correct_images(claim: SimpleNamespace) -> None:
    distances = [0.0] * 6 + [0.01, 0.021, 0.032, 0.043]  # six misclassified images of ten
    counts, edges = np.histogram(distances, bins=40)
    tested = {
        "clean": {"accuracy": 0.4, "images": 10},
        "fab-min": {"distances": {"counts": counts.tolist(), "edges": edges.tolist()}},
    }
    width = edges[1]
    assert abs(claim.claim_tables.median_distance(tested) - 0.021) <= width
    # An image without a distance is further away than any other.
    tested["clean"] = {"accuracy": 0.6, "images": 12}
    assert abs(claim.claim_tables.median_distance(tested) - 0.032) <= width


def test_runs_tell_their_own_machines_and_commits(
    claim: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = import_module("tables")
    made = {"commit": "0123456789abc", "cpu": "1-core A", "torch": "2.11.0", "threads": 1}
    runs = {"a": {"made": made}, "b": {"made": made}, "c": {"made": made | {"commit": "fedcba98765-dirty"}}}
    machine = {"cpu": "2-core B", "threads": 2, "time": "2026-11-30"}
    values = {"runs": runs, "environment": machine}
    assert tables.origin(values) == (
        "runs on 1-core A, 1 thread, torch 2.11.0, commit `0123456789`; "
        "runs on 1-core A, 1 thread, torch 2.11.0, commit `fedcba9876` with uncommitted changes"
    )
    one = machine | {"torch": "2.11.0", "python": "3.11"}
    assert tables.origin({"environment": one, "commit": "0123456789abc-dirty"}) == (
        "2-core B, 2 threads, torch 2.11.0, python 3.11, 2026-11-30, "
        "commit `0123456789` with uncommitted changes"
    )


def test_autoattacks_contrasts_are_those_of_its_images(claim: SimpleNamespace) -> None:
    def run(arm: str, seed: int, bits: str) -> dict[str, Any]:
        one = {"fast-autoattack": {"bits": bits, "images": 8}}
        own = {"model": "small", "images": 5000, "augment": "crop-flip", "arm": arm, "seed": seed}
        return own | {"robust": {"best": one, "last": one}}

    runs = {f"{seed}": run("madry", seed, "ff") for seed in (1, 2, 3)}
    runs |= {f"dynat-{seed}": run("dynat", seed, "0f") for seed in (1, 2, 3)}
    found = {one["name"]: one for one in claim.claim_results.under_autoattack(runs)}
    assert found["H1-best"]["estimate"]["mean"] == found["H1-last"]["estimate"]["mean"] == -50.0
    assert found["H5-trades"]["estimate"] is None
    assert {(one["verdict"], one["adjusted_p"]) for one in found.values()} == {("described", None)}
