"""Signals at any moment, pipes and terminals that go away, and several runs begun at once."""

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdynat.commands import main as cli
from fastdynat.commands.main import main
from fastdynat.runs import find_checkpoint
from fastdynat.terminal.interrupts import Interruption
from fastdynat.terminal.stop_request import StopRequest
from fastdynat.training.step import TrainStep

TINY = ["--train-size", "64", "--val-size", "20", "--batch-size", "32", "--steps", "1", "--method", "madry"]
LONG = [*TINY, "--epochs", "5000"]
STOPS = [(signal.SIGINT, 130, ""), (signal.SIGTERM, 143, " by SIGTERM"), (signal.SIGHUP, 129, " by SIGHUP")]


STARTED: list["subprocess.Popen[str]"] = []


def start(*arguments: object, **more: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "fastdynat", *map(str, arguments)]
    STARTED.append(
        subprocess.Popen(command, text=True, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more})
    )
    return STARTED[-1]


@pytest.fixture(autouse=True)
def _nothing_runs_on() -> Iterator[None]:
    """A test that fails leaves no training behind."""
    yield
    while STARTED:
        STARTED.pop().kill()


def wait_for(path: Path) -> None:
    until = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code", "by"), STOPS)
@pytest.mark.parametrize(
    "turned_into", [None, ImportError("half imported"), SystemError("raised unreported exception")]
)
def test_a_signal_before_there_is_anything_to_save_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    code: int,
    by: str,
    turned_into: Exception | None,
) -> None:
    """Also where a library turns the exception into another one."""

    def loading(argv: list[str]) -> int:
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except KeyboardInterrupt:
            raise (turned_into or KeyboardInterrupt) from None
        return 0

    before = [signal.getsignal(stop) for stop, _, _ in STOPS]
    monkeypatch.setattr(cli, "_run", loading)
    assert main(["train"]) == code
    assert capsys.readouterr().err == f"fastdynat: interrupted{by}\n"
    assert [signal.getsignal(stop) for stop, _, _ in STOPS] == before


def test_an_ignored_hangup_stays_ignored() -> None:
    """nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption(), StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_forked_worker_does_not_inherit_the_handlers() -> None:
    with Interruption(), StopRequest():
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        time.sleep(0.2)
        os.kill(child, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM


def test_a_hangup_saves_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls = TrainStep.__call__, []

    def interrupted(self: TrainStep, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGHUP)
        return step(self, batch)

    monkeypatch.setattr(TrainStep, "__call__", interrupted)
    run = tmp_path / "run"
    assert main(["train", "--run-dir", str(run), *TINY, "--epochs", "3", "--quiet"]) == 129
    last = find_checkpoint(run, "last")
    assert last is not None
    assert torch.load(last / "state.pt", weights_only=True)["global_step"] == 3


def test_a_terminal_that_goes_away_loses_nothing(tmp_path: Path) -> None:
    """Closing it sends SIGHUP, and every word to it fails from then on."""
    run = tmp_path / "run"
    master, terminal = pty.openpty()
    process = start(
        "train",
        "--run-dir",
        run,
        *LONG,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    wait_for(run / "metrics.jsonl")
    os.close(master)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 129
    last = find_checkpoint(run, "last")
    assert last is not None
    position = torch.load(last / "state.pt", weights_only=True)
    rows = (run / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == position["epoch"]


def test_a_reader_of_the_messages_that_goes_away_does_not_stop_the_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    read, write = os.pipe()
    os.close(read)
    process = start("train", "--run-dir", run, *TINY, "--epochs", "2", stderr=write)
    os.close(write)
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_reader_of_the_results_that_goes_away_is_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    process = start("recipes", stdout=write)
    os.close(write)
    assert process.communicate()[1] == ""
    assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_in_the_first_seconds(tmp_path: Path, number: signal.Signals, code: int) -> None:
    for i, moment in enumerate((0.3, 0.6, 1.0, 1.5, 2.0, 3.0)):
        process = start("train", "--run-dir", tmp_path / str(i), *LONG)
        time.sleep(moment)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == code
        assert "Traceback" not in said


def test_runs_begun_at_once_take_a_name_each(tmp_path: Path) -> None:
    begun = [start("train", *TINY, "--epochs", "1", "--quiet", cwd=tmp_path) for _ in range(3)]
    said = [process.communicate(timeout=200)[1] for process in begun]
    assert [process.returncode for process in begun] == [0, 0, 0], said
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        "digits-madry",
        "digits-madry-2",
        "digits-madry-3",
    }


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_spares_the_loader_s_workers(
    tmp_path: Path, number: signal.Signals
) -> None:
    """As a terminal, torchrun and SLURM send it: the step is finished and saved."""
    run = tmp_path / "run"
    flags = ["--loader", "torch", "--workers", 2, "--save-every", 0.0001, "--run-dir", run]
    training = start("train", *LONG, *flags, start_new_session=True)
    wait_for(run / "last")
    os.killpg(training.pid, number)
    out, err = training.communicate(timeout=120)
    assert training.returncode == 128 + number
    assert "stopped and saved after" in out + err
    assert "Traceback" not in out + err
