"""`fastdynat train --submit`: refusals before submission, the job handed to SLURM, requeueing, resuming."""

import json
import os
import pickle
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import needs

from fastdynat.commands.main import main
from fastdynat.commands.submit import train_task
from fastdynat.commands.submit.job_file import read_job_file
from fastdynat.commands.submit.submission import without_flag
from fastdynat.commands.submit.train_task import TrainTask
from fastdynat.config import read_config_file
from fastdynat.errors import UserError
from fastdynat.terminal.stop_request import StopRequest, request_stop

pytestmark = needs("submitit")

TINY = ["--method", "madry", "--model", "small", "--train-size", "64", "--val-size", "20"]
TINY += ["--batch-size", "32", "--steps", "1", "--epochs", "2", "--quiet"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SLURM = "gpus_per_node: 4\nnodes: 2\ncpus_per_task: 8\ntimeout_min: 60\nslurm_partition: big\n"


def job_file(folder: Path, text: str) -> str:
    path = folder / "job.yaml"
    path.write_text(text)
    return str(path)


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where what is handed to the stand-in for SLURM arrives: `batch`, and `requeued`."""
    arrived, programs = tmp_path / "arrived", tmp_path / "bin"
    arrived.mkdir()
    programs.mkdir()
    script(programs / "srun", "exit 1")
    script(
        programs / "sbatch", f'cp "$1" {arrived}/batch; env > {arrived}/env; echo Submitted batch job 4711'
    )
    script(programs / "scontrol", f'echo "$@" > {arrived}/requeued')
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return arrived


def test_the_job_of_slurm(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")  # of the job that this shell runs in
    file = job_file(tmp_path, SLURM)
    assert main(["train", "--submit", file, "--run-dir", "runs/here", *TINY]) == 0
    batch = (cluster / "batch").read_text()
    for line in (
        "--job-name=here",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--time=60",
        "--partition=big",
        "--requeue",
        "--signal=USR2@120",
    ):
        assert f"#SBATCH {line}\n" in batch
    (run,) = [line for line in batch.splitlines() if line.startswith("srun ")]
    assert " --kill-on-bad-exit=1 --cpus-per-task=8 " in run
    assert "\nRANK=" not in (cluster / "env").read_text()
    shown = capsys.readouterr().out
    assert f"logs: {tmp_path}/slurm/4711_*_log.out" in shown
    assert "cancel: scancel 4711" in shown
    assert "job 4711 (slurm): 2 x 4 tasks" in shown
    assert not Path("runs").exists()

    from submitit.core.utils import DelayedSubmission

    stored = DelayedSubmission.load(tmp_path / "slurm" / "4711_submitted.pkl")
    expected = ("--run-dir", "runs/here", *TINY, "--resume", "auto")
    assert stored.function == TrainTask(expected, str(tmp_path))


@pytest.mark.parametrize("folder", ["slurm", "logs/%j/x"])
def test_a_job_keeps_the_configuration_that_was_submitted(
    folder: str, cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file may change while the job waits in the queue; here its task runs in this process."""
    from submitit.core.utils import DelayedSubmission

    mine = tmp_path / "mine.yaml"
    mine.write_text("lr: 0.05\nschedule: constant\n")
    job = job_file(tmp_path, f"timeout_min: 60\nfolder: {folder}\n")
    assert main(["train", "--submit", job, "--run-dir", "run", "--config=mine.yaml", *TINY]) == 0
    mine.write_text("lr: 0.5\n")
    stored = DelayedSubmission.load(tmp_path / folder.replace("%j", "4711") / "4711_submitted.pkl")
    task = stored.function
    (copy,) = (tmp_path / folder.partition("/")[0]).glob("config-*.yaml")
    assert task.arguments == ("--run-dir", "run", *TINY, "--config", str(copy), "--resume", "auto")
    assert main(["train", *task.arguments]) == 0
    kept = read_config_file(tmp_path / "run" / "config.yaml")
    assert (kept["lr"], kept["schedule"]) == (0.05, "constant")
    assert main(["train", *task.arguments]) == 0  # requeued


REFUSALS = {
    "a wrong flag": (["--lrr", "1"], "unknown flag --lrr: did you mean --lr?"),
    "a flag without effect": (["--milestones", "0.5"], "has no effect"),
    "a switch": (["--guide-stream", "on"], "--guide-stream on: method madry has no guide"),
    "too few images": (["--train-size", "6400"], "--train-size 6400: digits has"),
    "an unknown network": (["--model", "resnet81"], "unknown model 'resnet81': did you mean"),
    "a small batch": (["--batch-size", "4"], "--batch-size 4: the job has 8 tasks"),
    "attacks that wait for each other": (["--method", "arda", "--attack-bn", "frozen"], "--attack-bn frozen"),
    "missing images": (
        ["--data", "imagefolder", "--data-dir", "nowhere", "--train-size", "4", "--batch-size", "8"],
        "nowhere",
    ),
    "overwriting": (["--overwrite"], "--overwrite with --submit: a requeued job would start over"),
    "an occupied folder": (["--run-dir", "arrived"], "arrived"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_work_is_refused_before_submission(
    case: str, cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, message = REFUSALS[case]
    (cluster / "something").touch()
    command = ["train", "--submit", job_file(tmp_path, SLURM), "--run-dir", "run", *TINY, *flags]
    assert main(command) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (cluster / "batch").exists()


def test_a_run_directory_must_be_named(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--submit", job_file(cluster, SLURM), *TINY]) == 2
    assert "--submit needs --run-dir, on a file system that" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partition: big", "unknown key 'partition': did you mean 'slurm_partition'"),
        ("gpus_per_nodes: 4", "unknown key 'gpus_per_nodes': did you mean 'gpus_per_node'"),
        ("slurm_gpus_per_task: 1", "slurm_gpus_per_task cannot be used: each task must see all GPUs"),
        ("gpus_per_node: 4\ntasks_per_node: 1", "tasks_per_node 1 with gpus_per_node 4: each task trains on"),
        ("gpus_per_node: four", "gpus_per_node must be a whole number, got 'four'"),
        ("nodes: true", "nodes must be a whole number, got True"),
        ("nodes: 0", "nodes and tasks_per_node must be at least 1, got 0 and 1"),
        ("cluster: pbs", "unknown cluster 'pbs'"),
        ("cluster: local\nnodes: 2", "nodes 2: cluster local is this machine alone"),
        ("timeout_min: 0", "timeout_min must be at least 1"),
        ("timeout_min: 2", "timeout_min 2: the run is told to save 120 seconds before the time limit"),
        ("timeout_min: null", "needs timeout_min"),
        ("- nodes", "must hold `key: value` lines"),
    ],
)
def test_a_wrong_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    if "timeout_min" not in text and not text.startswith("-"):
        text = f"{text}\ntimeout_min: 60"
    with pytest.raises(UserError) as error:
        read_job_file(Path(job_file(tmp_path, text)), "name")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_keys_of_the_other_cluster_are_left_out(tmp_path: Path) -> None:
    file = job_file(tmp_path, SLURM.replace("nodes: 2", "cluster: local\nslurm_max_num_timeout: 2"))
    found = read_job_file(Path(file), "name")
    assert (found.tasks, found.options) == (4, {"local_max_num_timeout": 1000})
    assert not [key for key in found.parameters if key.startswith("slurm_")]


def test_a_refusal_of_sbatch_is_one_line(
    cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script(tmp_path / "bin" / "sbatch", "echo 'sbatch: error: invalid partition specified: big' >&2; exit 1")
    assert main(["train", "--submit", job_file(tmp_path, SLURM), "--run-dir", "run", *TINY]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "fastdynat: error: sbatch refused the job: sbatch: error: invalid partition specified: big"


def test_without_slurm_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["train", "--submit", job_file(tmp_path, SLURM), "--run-dir", "run", *TINY]) == 2
    assert "there is no SLURM here (srun is not on PATH)" in capsys.readouterr().err


def test_without_the_extra_it_names_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["train", "--submit", "job.yaml", "--run-dir", "run", *TINY]) == 2
    assert "pip install 'fastdynat[slurm]'" in capsys.readouterr().err


def test_the_flag_is_taken_out_in_each_spelling() -> None:
    words = ["--submit", "a.yaml", "--quiet", "--submit=b.yaml", "--submitted", "c"]
    assert without_flag(words, "--submit") == ["--quiet", "--submitted", "c"]


def test_a_request_stops_without_interrupting() -> None:
    assert not request_stop(signal.SIGUSR2)
    with StopRequest() as stop:
        assert not stop.requested()
        assert request_stop(signal.SIGUSR2)
        assert request_stop(signal.SIGUSR2)
        assert stop.signal is signal.SIGUSR2
    assert not request_stop(signal.SIGUSR2)


class Requeued(Exception):
    """Raised by the stand-in for submitit's handler, whose process would end."""


@pytest.fixture
def handler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """What happened so far, in order; submitit's handler of the signal adds to it and raises `Requeued`."""
    happened: list[str] = []

    def requeue(number: int, frame: Any) -> None:
        happened.append("requeued")
        raise Requeued

    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setattr(train_task, "_export_ranks", lambda: None)
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGUSR2, requeue)
    yield happened
    signal.signal(signal.SIGUSR2, before)


def runs(monkeypatch: pytest.MonkeyPatch, command: Callable[[list[str]], int]) -> TrainTask:
    monkeypatch.setattr("fastdynat.commands.main.main", command)
    return TrainTask(("--quiet",), os.getcwd())


def told() -> None:
    os.kill(os.getpid(), signal.SIGUSR2)


def test_the_run_saves_before_the_job_is_requeued(
    handler: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(argv: list[str]) -> int:
        assert argv == ["train", "--quiet"]
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGTERM)  # SLURM may send both
            told()
            assert stop.requested()
            handler.append("saved")
        return 143

    with pytest.raises(Requeued):
        runs(monkeypatch, command)()
    assert handler == ["saved", "requeued"]


def test_a_signal_before_there_is_anything_to_save_requeues(
    handler: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(argv: list[str]) -> int:
        told()
        raise AssertionError("not reached")

    with pytest.raises(Requeued):
        runs(monkeypatch, command)()


@pytest.mark.parametrize("code", [0, 1, 2])
def test_what_has_ended_is_not_requeued(
    code: int, handler: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(argv: list[str]) -> int:
        with StopRequest():
            told()
        return code

    task = runs(monkeypatch, command)
    if code == 0:
        assert task() == 0
    else:
        with pytest.raises(SystemExit) as end:
            task()
        assert end.value.code == code
    assert handler == []


def test_a_forked_worker_works_until_its_parent_stops(
    handler: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(argv: list[str]) -> int:
        child = os.fork()
        if child == 0:
            told()
            os._exit(7)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    with pytest.raises(SystemExit) as end:
        runs(monkeypatch, command)()
    assert end.value.code == 7


def test_after_a_sigterm_alone_the_task_waits_for_slurm(
    handler: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancelled job is killed then; a preempted one may still get the signal."""
    waited = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            told()

    monkeypatch.setattr(train_task.time, "sleep", sleep)
    with pytest.raises(Requeued):
        runs(monkeypatch, lambda argv: 143)()
    assert len(waited) == 3


LOCAL = "cluster: local\ntasks_per_node: 2\ntimeout_min: 5\n"
LONG = ["--epochs", "30", "--val-every", "30", "--run-dir", "run"]


def submitted(folder: Path) -> int:
    """The process that controls a job of two tasks on this machine: the training that `LONG` describes."""
    command = [sys.executable, "-m", "fastdynat", "train", "--submit", job_file(folder, LOCAL), *TINY, *LONG]
    # Not a pipe: the job inherits standard output, and a pipe would wait for its end.
    with (folder / "said").open("w") as said:
        subprocess.run(command, stdout=said, cwd=folder, env=ENVIRONMENT, check=True)
    return int((folder / "said").read_text().split()[1])


def wait(reached: Callable[[], object], job: int) -> None:
    until = time.monotonic() + 180
    while not reached():
        if time.monotonic() > until:
            os.kill(job, signal.SIGINT)
            raise AssertionError("it took too long")
        time.sleep(0.05)


def tasks(job: int) -> list[int]:
    """The processes of the job's tasks."""
    return [int(word) for word in Path(f"/proc/{job}/task/{job}/children").read_text().split()]


def rows(run: Path) -> int:
    """Completed epochs."""
    log = run / "metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def test_two_tasks_stop_at_the_signal_are_requeued_and_resume(tmp_path: Path) -> None:
    """A job on this machine in place of SLURM's."""
    job = submitted(tmp_path)
    run, logs = tmp_path / "run", [tmp_path / "slurm" / f"{job}_{rank}_log.out" for rank in (0, 1)]
    wait(lambda: rows(run) >= 3 or not Path(f"/proc/{job}").exists(), job)
    assert rows(run) < 30, logs[0].read_text()
    for process in tasks(job):
        os.kill(process, signal.SIGUSR2)
    wait(lambda: not Path(f"/proc/{job}").exists(), job)
    first, second = (log.read_text() for log in logs)
    assert rows(run) == 30, first
    assert "Calling checkpoint method." in first
    assert "Requeued job" in first
    assert "\nresuming run " in first.partition("Requeued job")[2]
    assert second.count("Starting with JobEnvironment") == 2
    for rank in (0, 1):
        result = tmp_path / "slurm" / f"{job}_{rank}_result.pkl"
        assert pickle.loads(result.read_bytes()) == ("success", 0)
    starts = json.loads((run / "environment.json").read_text())
    assert len(starts) == 2
