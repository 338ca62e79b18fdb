"""Trainings on two processes under torchrun: one writer, resuming at any world size, failures, bad input."""

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.torchrun import TINY, Torchrun, torchrun

from fastdynat.commands.main import main
from fastdynat.runs import check_manifest, find_checkpoint
from fastdynat.runs.environment import read_starts

ENDS = 20.0  # seconds within which all processes must have ended after the failure of one


def train(run: Path, *flags: object, epochs: int = 3) -> list[str]:
    return [*map(str, ("train", "--run-dir", run, *TINY, "--epochs", epochs, *flags))]


def newest(run: Path) -> dict[str, Any]:
    """The training state of the newest checkpoint, whose files are whole."""
    last = find_checkpoint(run, "last")
    assert last is not None
    check_manifest(last)
    found: dict[str, Any] = torch.load(last / "state.pt", weights_only=True)
    return found


def distance(run: Path, other: Path) -> float:
    """The largest difference between the weights of two runs."""
    a, b = (load_file(path / "last" / "model.safetensors") for path in (run, other))
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


HOOK = """
import os, sys, time
import torch
import fastdynat
from fastdynat.training import rank_start
from fastdynat.training.step import TrainStep

HOW, RANK = os.environ["HOW"], os.environ["RANK"]
step, calls = TrainStep.__call__, []

def call(self, batch):
    calls.append(1)
    if len(calls) == 6 and RANK == "1":
        if HOW == "raise":
            raise ZeroDivisionError("not on this rank")
        if HOW == "memory":
            raise MemoryError
        if HOW == "stuck":
            time.sleep(1000)
        if HOW == "nan":
            with torch.no_grad():
                next(self.networks.raw["model"].parameters()).fill_(float("nan"))
    return step(self, batch)

TrainStep.__call__ = call
if RANK == "1":
    if HOW == "flags":
        sys.argv += ["--lr", "0.2"]
    if HOW == "version":
        fastdynat.__version__ = "0.0"
    if HOW == "source":
        rank_start.package_digest = lambda: "another"
    if HOW == "late":
        time.sleep(1000)
    if HOW == "elsewhere":
        os.chdir(os.environ["ELSEWHERE"])
        rank_start.require_shared.__globals__["VISIBLE_SECONDS"] = 0.1
        exists = type(rank_start.Path()).exists
        rank_start.Path.exists = lambda self, **how: ".fastdynat-" not in self.name and exists(self, **how)
        os.environ["LOCAL_RANK"] = "0"
from fastdynat.commands.main import main

sys.exit(main())
"""


@pytest.fixture
def hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script that is `fastdynat`, but on rank 1 goes wrong in the way that HOW says."""
    monkeypatch.setenv("ELSEWHERE", str(tmp_path))
    script = tmp_path / "hook.py"
    script.write_text(HOOK)
    return script


def test_a_run_goes_on_at_any_world_size(tmp_path: Path) -> None:
    """2 processes in mid-epoch (SIGINT), then one, then two, against one process from the beginning."""
    run, alone = tmp_path / "run", tmp_path / "alone"
    command = train(run, "--resume", "auto", epochs=60)
    with Torchrun(*command) as running:
        running.wait_for(run / "metrics.jsonl")
        running.process.send_signal(signal.SIGINT)
        ended = running.end()
    assert ended.errors == []
    assert any("stopped and saved after" in line for line in ended.lines)
    state = newest(run)
    done = state["epoch"]
    assert 1 <= done < 57
    assert state["averages"]["images"] == 16 * state["epoch_step"], "those of both processes"
    assert [start["processes"] for start in read_starts(run / "environment.json")] == [2]
    assert main([*command, "--stop-after", str(done + 2)]) == 0
    assert torchrun(*command, "--stop-after", done + 3).code == 0
    assert main(train(alone, "--stop-after", done + 3, epochs=60)) == 0
    assert distance(run, alone) < 1e-5
    for ours, theirs in zip(rows(run), rows(alone), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["val_pgd10_acc"] == theirs["val_pgd10_acc"]
    assert {path.name for path in run.iterdir()} == {path.name for path in alone.iterdir()}
    assert (run / "metrics.csv").read_text().count("\n") == done + 4
    assert [start["processes"] for start in read_starts(run / "environment.json")] == [2, 1, 2]


def test_the_end_of_one_process_ends_all(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Torchrun(*train(run, epochs=1500)) as running:
        running.wait_for(run / "metrics.jsonl")
        victim = running.pids()[1]
        os.kill(victim, signal.SIGKILL)
        ended = running.end(ENDS)
        assert running.pids() == {}
    assert ended.code == 1
    assert len(ended.errors) == 1
    assert ended.errors[0].startswith("fastdynat: error: rank 1 (")
    assert f"pid {victim}) was lost" in ended.errors[0]
    assert not any("Traceback" in line for line in ended.lines)
    assert newest(run)["epoch"] >= 1


def test_an_error_on_one_process_is_told_with_its_rank(
    tmp_path: Path, hook: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOW", "raise")
    run = tmp_path / "run"
    ended = torchrun(*train(run), script=hook)
    assert ended.code == 1
    told = [line for line in ended.lines if line.startswith("rank 1 (")]
    assert told[-1].endswith("ZeroDivisionError: not on this rank")
    assert ended.errors == []
    assert "rank 0" not in "".join(ended.lines), "the others are silent"
    assert newest(run)["epoch"] == 1


REFUSED = [
    ("flags", [], "the ranks differ in --lr: None on rank 0 ("),
    ("source", [], "the ranks differ in the source of fastdynat: "),
    ("version", [], "the ranks differ in the version of fastdynat: "),
    ("late", ["--rank-timeout", "0.1"], "rank 1 of 2 did not join the rendezvous within 0.1 minutes"),
    ("elsewhere", [], "this machine does not see the run directory"),
    ("", ["--batch-size", "2"], "batch"),
    ("", ["--lr", "fast"], "--lr must be a number, got 'fast'"),
    ("", ["--device", "cuda:0"], "--device cuda:0: each of 2 processes takes the GPU of its local rank"),
    ("", ["--train-size", "500000"], "digits has"),
]
QUICK = ("flags", "--lr fast")


@pytest.mark.parametrize(
    ("how", "flags", "said"),
    [
        pytest.param(
            *case,
            id=case[0] or " ".join(case[1]),
            marks=() if (case[0] or " ".join(case[1])) in QUICK else pytest.mark.slow,
        )
        for case in REFUSED
    ],
)
def test_bad_input_is_one_line_of_one_process(
    how: str, flags: list[str], said: str, tmp_path: Path, hook: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOW", how)
    run = tmp_path / "run"
    ended = torchrun(*train(run, *flags), script=hook)
    assert len(ended.errors) == 1, ended.said
    assert said in ended.errors[0]
    assert not any("Traceback" in line or line.startswith("rank ") for line in ended.lines)
    assert "exitcode  : 2" in ended.said
    assert not run.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["hook.py"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("memory", "rank 1 ({host}): out of memory"),
        ("stuck", "rank 1 ({host}, pid "),
    ],
)
def test_failures_of_one_process_are_one_line(
    how: str, said: str, tmp_path: Path, hook: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    monkeypatch.setenv("HOW", how)
    run = tmp_path / "run"
    with Torchrun(*train(run, "--rank-timeout", 0.2), script=hook) as running:
        ended = running.end()
        assert running.pids() == {}
    assert len(ended.errors) == 1
    assert said.format(host=socket.gethostname()) in ended.errors[0]
    assert how != "stuck" or ended.errors[0].endswith("a collective within 0.2 minutes (--rank-timeout)")
    assert newest(run)["epoch"] == 1


@pytest.mark.slow
def test_a_loss_that_is_no_number_on_one_process_ends_all(
    tmp_path: Path, hook: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOW", "nan")
    run = tmp_path / "run"
    ended = torchrun(*train(run), script=hook)
    assert [line for line in ended.lines if "diverged" in line] == [
        line for line in ended.lines if line.startswith("error: training diverged: ")
    ]
    assert sum("diverged" in line for line in ended.lines) == 1
    assert newest(run)["epoch"] == 1


STARTING = """
import os, sys, time
import fastdynat.launch

open(os.environ["HERE"] + os.environ["RANK"], "w").close()
while not os.path.exists(os.environ["GO"]):
    time.sleep(0.05)
from fastdynat.commands.main import main

sys.exit(main())
"""


def test_a_launcher_that_is_killed_before_its_processes_have_joined_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store that it kept has ended before they can reach it; they do not wait for --rank-timeout."""
    here, go, script = tmp_path / "here", tmp_path / "go", tmp_path / "starting.py"
    monkeypatch.setenv("HERE", str(here))
    monkeypatch.setenv("GO", str(go))
    script.write_text(STARTING)
    with Torchrun(*train(tmp_path / "run"), script=script) as running:
        for rank in (0, 1):
            running.wait_for(Path(f"{here}{rank}"))
        running.process.kill()
        running.process.wait()
        go.touch()
        ended = running.end(90)  # reads until the ranks have closed their output, too
    assert ended.errors == ["fastdynat: error: the launcher has ended without its processes"]
    assert not any("Traceback" in line for line in ended.lines)


@pytest.mark.slow
def test_a_launcher_that_is_killed_leaves_no_process(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Torchrun(*train(run, epochs=1500)) as running:
        running.wait_for(run / "metrics.jsonl")
        ranks = running.pids()
        running.process.kill()
        ended = running.end(60)  # reads until the ranks have closed their output, too
    assert ended.errors == ["fastdynat: error: the launcher has ended without its processes"]
    until = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in ranks.values()):  # until init has seen their end
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_is_restarted_and_the_weights_are_the_same(victim: int, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    flags = ["--resume", "auto", "--save-every", "0.01", "--loader", "torch", "--workers", "1"]
    command = train(run, *flags, epochs=30)
    options = ("--max-restarts", "3")
    with Torchrun(*command, options=options) as running:
        running.wait_for(run / "metrics.jsonl")
        os.kill(running.pids()[victim], signal.SIGKILL)
        ended = running.end()
    assert ended.code == 0, ended.said
    assert len(read_starts(run / "environment.json")) == 2
    assert torchrun(*train(whole, *flags, epochs=30)).code == 0
    assert distance(run, whole) == 0
    assert [row["loss"] for row in rows(run)] == pytest.approx(
        [row["loss"] for row in rows(whole)], rel=1e-12
    )


@pytest.mark.slow
def test_other_data_are_refused_when_resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one process the user's file makes other images than those that the run began with."""
    data, run = tmp_path / "data.py", tmp_path / "run"
    data.write_text(
        "import os, torch\n"
        "def make():\n"
        "    images = torch.arange(100 * 1024).view(100, 1, 32, 32).remainder(251).to(torch.uint8)\n"
        "    images += int(os.environ.get('OTHER', '0')) * int(os.environ.get('RANK', '0'))\n"
        "    return images, torch.arange(100) % 4\n"
    )
    began = torchrun(*train(run, "--data", f"{data}:make", "--stop-after", 1))
    assert began.code == 0, began.said
    monkeypatch.setenv("OTHER", "1")
    ended = torchrun("train", "--resume", run)
    assert len(ended.errors) == 1, ended.said
    assert ended.errors[0].startswith("fastdynat: error: rank 1 (")
    assert "the checkpoint was made with other training data" in ended.errors[0]
    assert newest(run)["epoch"] == 1


def starts_in(record: Path) -> int:
    return len(read_starts(record)) if record.exists() else 0


def wait_for_another_start(record: Path, before: int) -> None:
    until = time.monotonic() + 60
    while starts_in(record) == before:
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.slow
def test_twenty_random_kills(tmp_path: Path) -> None:
    """Whenever a process is killed, at its start, in a step or while it saves, the job ends as without."""
    run, whole, moments = tmp_path / "run", tmp_path / "whole", random.Random(0)
    command, record = ["--resume", "auto", "--save-every", "0.005"], run / "environment.json"
    with Torchrun(*train(run, *command, epochs=150), options=("--max-restarts", "25")) as running:
        killed: set[int] = set()
        for number in range(20):
            until = time.monotonic() + 60
            while len(new := set(running.pids().values()) - killed) < 2:
                assert time.monotonic() < until
                assert running.process.poll() is None, "the training was over before the last kill"
                time.sleep(0.05)
            if number % 2:  # not before it trains
                wait_for_another_start(record, starts_in(record))
            time.sleep(moments.uniform(0, 1 if number % 2 else 8))
            killed |= new
            os.kill(moments.choice(sorted(new)), signal.SIGKILL)
        ended = running.end(600)
        assert running.pids() == {}
    assert ended.code == 0, ended.said
    assert starts_in(record) > 10
    with Torchrun(*train(whole, *command, epochs=150)) as running:
        assert running.end(600).code == 0
    assert distance(run, whole) == 0
    losses = [[row["loss"] for row in rows(path)] for path in (run, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
