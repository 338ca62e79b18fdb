"""Decisions, failures and states that ranks share, without a training."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdynat.commands.main import main
from fastdynat.distributed import World, all_can, first_decides, require_alike, world
from fastdynat.distributed.members import Member, unfit
from fastdynat.errors import UserError
from fastdynat.methods import method_class, options_type
from fastdynat.runs import RunDir
from fastdynat.runs.rundir import lock_folder
from fastdynat.training.method_buffers import load_buffers, rows_per_image, whole_buffers
from fastdynat.training.metrics import Averages
from fastdynat.training.step_agreement import StepAgreement


def outcome(act: Callable[[], Any]) -> tuple[str, Any]:
    """The value of `act`, or the kind and text of its error."""
    try:
        return "value", act()
    except UserError as error:
        return type(error).__name__, str(error)


def _refuse(text: str) -> Any:
    raise UserError(text)


def _first() -> list[tuple[str, Any]]:
    rank = world().rank
    return [
        outcome(lambda: first_decides(lambda: {"from": rank})),
        outcome(lambda: first_decides(lambda: _refuse(f"refused by {rank}"))),
    ]


def test_rank_0_decides_or_refuses_for_all(ranks) -> None:
    first, second = ranks(2)(_first)
    assert first == [("value", {"from": 0}), ("UserError", "refused by 0")]
    assert second == [("value", {"from": 0}), ("ToldElsewhere", "refused by 0")]


def _can(fails: int) -> tuple[str, Any]:
    rank = world().rank
    return outcome(lambda: all_can(lambda: _refuse(f"rank {rank} cannot") if rank >= fails else rank))


@pytest.mark.parametrize(("fails", "tells"), [(0, 0), (1, 1)])
def test_the_lowest_rank_that_cannot_tells_it(fails: int, tells: int, ranks) -> None:
    found = ranks(2)(_can, fails)
    said = f"rank {tells} cannot"
    assert found == [("UserError" if rank == tells else "ToldElsewhere", said) for rank in range(2)]


def test_a_rank_gets_its_own_result_when_all_can(ranks) -> None:
    assert ranks(2)(_can, 2) == [("value", 0), ("value", 1)]


def _alike() -> list[tuple[str, Any]]:
    rank = world().rank
    same, other = {"the data": 7, "--lr": 0.1}, {"the data": 7, "--lr": 0.1 * (1 + rank)}
    return [outcome(lambda: require_alike(same)), outcome(lambda: require_alike(other))]


def test_ranks_that_differ_are_told_in_what(ranks) -> None:
    first, second = ranks(2)(_alike)
    assert first[0] == second[0] == ("value", None)
    kind, said = first[1]
    assert kind == "UserError"
    assert "the ranks differ in --lr: 0.1 on rank 0 (" in said
    assert "), 0.2 on rank 1 (" in said
    assert second[1] == ("ToldElsewhere", said)


def _after_steps(asking: int) -> list[tuple[int, bool]]:
    """(signal, save) after each of twelve steps; rank `asking` gets a signal in the third."""
    rank, together, found = world().rank, StepAgreement(world()), []
    for step in range(12):
        time.sleep(0.1 * (1 + rank))
        asked = signal.SIGTERM if rank == asking and step >= 2 else None
        decided = together.after_step(asked, rank == 0)
        found.append((int(decided.stop or 0), decided.save))
    return found


@pytest.mark.parametrize("asking", [0, 1])
def test_a_signal_on_one_rank_stops_all_at_the_same_step(asking: int, ranks) -> None:
    first, second = ranks(2)(_after_steps, asking)
    assert first == second
    assert first[0] == (0, True), "the first step ends with an exchange, whose wish to save is rank 0's"
    assert (signal.SIGTERM, True) in first
    assert (0, False) in first, "not every step is one of exchange"


def test_one_process_decides_at_every_step() -> None:
    together = StepAgreement(World())
    assert together.after_step(signal.SIGINT, False).stop == signal.SIGINT
    assert together.after_step(None, True).save


def _averages() -> dict[str, Any]:
    rank, found = world().rank, Averages()
    found.add({"loss": torch.tensor(1.0 + rank)}, 3 - rank)  # three images on rank 0, two on rank 1
    found.add({"loss": torch.tensor(10.0)}, 0.5)  # one image that both have
    return found.of_all(world()).state_dict()


def test_averages_of_all_ranks_are_those_of_one_process(ranks) -> None:
    alone = Averages()
    alone.add({"loss": torch.tensor((3 * 1.0 + 2 * 2.0) / 5)}, 5)
    alone.add({"loss": torch.tensor(10.0)}, 1)
    for found in ranks(2)(_averages):
        assert found["images"] == alone.state_dict()["images"] == 6
        torch.testing.assert_close(found["sums"]["loss"], alone.state_dict()["sums"]["loss"])


def _whole(images: int) -> torch.Tensor:
    """The perturbations of `free` as a checkpoint holds them; each rank's rows are positions r, r + 2, ..."""
    here = world()
    rows = torch.arange(here.rank, images, here.size, dtype=torch.float32)
    return whole_buffers({"delta": rows.view(-1, 1)}, {"delta"}, here)["delta"]


@pytest.mark.parametrize("images", [8, 9])
def test_rows_per_image_are_kept_in_the_order_of_the_batch(images: int, ranks) -> None:
    for found in ranks(2)(_whole, images):
        assert found.flatten().tolist() == list(range(images))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_rows_per_image_are_dealt_out_to_any_world(size: int) -> None:
    saved = {"delta": torch.arange(10.0).view(10, 1), "ema": torch.tensor([1.0, 2.0])}
    for rank in range(size):
        count = len(range(rank, 10, size))
        own = {"delta": torch.zeros(count, 1), "ema": torch.zeros(2)}
        load_buffers(own, saved, {"delta"}, World(rank, size))
        assert own["delta"].flatten().tolist() == list(range(rank, 10, size))
        assert own["ema"].tolist() == [1.0, 2.0]


def test_free_is_the_method_with_a_row_per_image() -> None:
    method = method_class("free")(options_type("free")())
    assert rows_per_image(method, (1, 4, 4)) == {"delta"}


def member(rank: int, device: str = "cuda", gpu: str = "", **other: Any) -> Member:
    return Member(rank, other.pop("host", "a"), 100 + rank, device, gpu or f"gpu-{rank}", **other)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([member(0), member(1)], ""),
        ([member(0, "cpu", " "), member(1, "cpu", " ", host="b")], ""),
        (
            [member(0), member(1, "cpu", host="b")],
            "rank 1 (b, pid 101) has no GPU, but rank 0 (a, pid 100) has",
        ),
        ([member(0, gpu="x"), member(1, gpu="x")], "rank 0 (a, pid 100) and rank 1 (a, pid 101) would share"),
        ([member(0, gpu="x"), member(1, gpu="x", host="b")], ""),
        (
            [member(0), member(1, problem="needs GPU 1, but this machine has 1")],
            "rank 1 (a, pid 101) needs GPU 1",
        ),
    ],
)
def test_ranks_whose_devices_do_not_fit(members: list[Member], said: str) -> None:
    found = unfit(members)
    assert found.startswith(said)
    assert bool(found) == bool(said)


def test_a_process_that_has_ended_is_dead() -> None:
    import socket

    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    about = Member(1, socket.gethostname(), process.pid, "cpu")
    assert not about.dead
    process.kill()
    until = time.monotonic() + 10
    while not about.dead and time.monotonic() < until:  # not waited for: a zombie
        time.sleep(0.01)
    assert about.dead
    process.communicate()
    assert about.dead
    assert not Member(1, "another host", process.pid, "cpu").dead


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    held = lock_folder(tmp_path)
    with pytest.raises(UserError, match="in use by another"):
        lock_folder(tmp_path)
    threading.Timer(0.5, held.close).start()
    lock_folder(tmp_path, seconds=30).close()


TINY = [
    *("--method", "madry", "--steps", "1", "--train-size", "64", "--val-size", "20", "--batch-size", "32"),
    *("--epochs", "2", "--quiet", "--resume", "auto"),
]


def test_resume_auto_starts_continues_and_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").touch()  # of a start that was killed before it had written its configuration
    command = ["train", "--run-dir", str(run), *TINY]
    assert main([*command, "--stop-after", "1"]) == 0
    assert "stopped and saved after 1 epochs" in capsys.readouterr().err
    identity = (run / "config.yaml").read_text().splitlines()[1]
    assert main(command) == 0
    assert f"resuming {run} after epoch 1" in capsys.readouterr().err
    assert (run / "config.yaml").read_text().splitlines()[1] == identity
    assert main(command) == 0
    assert f"{run} is finished after 2 epochs" in capsys.readouterr().err
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


def test_resume_auto_keeps_the_method_where_none_is_given(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["train", "--run-dir", str(run), *TINY, "--stop-after", "1"]) == 0
    assert main(["train", "--run-dir", str(run), "--resume", "auto", "--quiet"]) == 0
    assert "method: madry" in (run / "config.yaml").read_text().splitlines()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lr", "0.2"], "lr is 0.03 in this run, not 0.2"),
        (["--method", "trades"], "trains by madry, not by trades"),
    ],
)
def test_resume_auto_refuses_another_run(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = ["train", "--run-dir", str(run), *TINY]
    assert main([*command, "--stop-after", "1"]) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main([*command, *flags]) == 2
    assert said in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("flags", [[], ["--run-dir", "RUN", "--overwrite"]])
def test_resume_auto_needs_to_know_where(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tmp_path / "run") if word == "RUN" else word for word in flags]
    assert main(["train", *TINY, *words]) == 2
    assert "--resume auto needs the run directory by --run-dir" in capsys.readouterr().err


def test_resume_auto_waits_for_workers_of_a_killed_process(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["train", "--run-dir", str(run), *TINY]
    assert main([*command, "--stop-after", "1"]) == 0
    held = RunDir.open(run)
    child = os.fork()
    if child == 0:  # holds the lock as a forked worker does
        time.sleep(1.0)
        os._exit(0)
    held.close()
    with pytest.raises(BlockingIOError), (run / ".lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert main(command) == 0
    os.waitpid(child, 0)


def test_commands_for_one_process_are_refused_under_a_launcher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launched = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**launched, "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(["compare", "--methods", "madry"]) == 2
    said = capsys.readouterr().err
    assert (
        said == "fastdynat: error: fastdynat compare is for one process, not 2: start it without torchrun\n"
    )


ORPHAN = """
import os, time
from fastdynat.launch import launcher_ended

shell = os.getppid()
print(launcher_ended(), flush=True)
while os.getppid() == shell:
    time.sleep(0.05)
print(launcher_ended(), flush=True)
"""


@pytest.mark.parametrize(("variable", "ends"), [("TORCHELASTIC_RUN_ID", True), ("SOMETHING_ELSE", False)])
def test_only_torchrun_must_outlive_its_processes(variable: str, ends: bool) -> None:
    """A shell that has started the ranks in the background may end."""
    environment = {k: v for k, v in os.environ.items() if k != "TORCHELASTIC_RUN_ID"} | {variable: "none"}
    with subprocess.Popen(
        ["sh", "-c", '"$0" -c "$1" & read go', sys.executable, ORPHAN],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as shell:
        assert shell.stdout is not None
        assert shell.stdout.readline() == "False\n"
        assert shell.communicate("\n", timeout=60)[0] == f"{ends}\n"
