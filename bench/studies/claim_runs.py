"""Makes the runs of the study one after the other; whatever is killed goes on where it was."""

import fcntl
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from claim_design import AUTOATTACK_IMAGES, BLOCKS, EPOCHS, EPS, STEP, Run, equal_seconds_epochs

COST_METHODS = ("madry", "dynat", "trades", "lbgat")
COST_ROUNDS = 5
SECONDS = "import time; time.perf_counter = time.process_time; "  # the log's seconds are then the processor's


@dataclass(frozen=True)
class Work:
    """Where the study works.

    Attributes:
        folder: of runs and results.
        data_dir: image folder with train/ and test/.
        epochs: of a run; another number than the study's is for tests.
        autoattack_images: number of test images for AutoAttack and distances.
        test_images: number of test images; None is all.
        changed: other values of the trainings' flags, for tests.
    """

    folder: Path
    data_dir: str
    epochs: int = EPOCHS
    autoattack_images: int = AUTOATTACK_IMAGES
    test_images: int | None = None
    changed: Mapping[str, str] = field(default_factory=dict)

    @property
    def runs(self) -> Path:
        """The folder of run directories."""
        return self.folder / "runs"

    def result(self, run: Run, part: str) -> Path:
        """The file of a finished measurement."""
        return self.folder / "results" / f"{run.name}.{part}.json"


@contextmanager
def alone(folder: Path) -> Iterator[int]:
    """Wait until no other runner, nor a training that one has left behind, uses `folder`.

    The descriptor that is yielded is passed on to the commands: they hold the lock as long as they live.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(f"{folder} is in use; waiting for the command that uses it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def command(work: Work, lock: int, name: str, arguments: list[str]) -> tuple[int, str]:
    """Run ``fastdynat``; returns its exit status and messages. Notes processor seconds in segments.jsonl."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    # Messages go to a file, not a pipe, so that a command outlives a runner that is killed.
    with (work.folder / "messages.log").open("a+") as messages:
        start = messages.seek(0, os.SEEK_END)
        program = [sys.executable, "-m", "fastdynat", *arguments]
        status = subprocess.run(program, pass_fds=(lock,), stderr=messages, check=False).returncode
        messages.seek(start)
        said = messages.read()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    row = {
        "name": name,
        "command": arguments[0],
        "cpu_seconds": round(used, 1),
        "seconds": round(time.time() - began, 1),
        "began": round(began),
        "load_average": os.getloadavg()[0],
        "code": status,
    }
    with (work.folder / "segments.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    return status, said


class Failed(Exception):
    """A command ended with an error."""


def check(status: int, said: str) -> None:
    """Raise Failed for an error; KeyboardInterrupt for a command that was stopped."""
    if status not in (0, 1, 2):
        raise KeyboardInterrupt
    if status:
        raise Failed(said.strip().rpartition("\n")[2])


def train(work: Work, lock: int, run: Run, epochs: int) -> None:
    """Start or continue a training; one that diverges ends with its last checkpoint. Raises Failed."""
    flags = run.flags(work.data_dir, work.runs, epochs, work.changed)
    status, said = command(work, lock, run.name, ["train", *flags, "--resume", "auto", "--quiet"])
    if status == 1 and "training diverged" in said:
        print(f"{run.name} diverged", flush=True)
    else:
        check(status, said)


def evaluate(work: Work, lock: int, run: Run, part: str, attacks: str, images: int | None) -> None:
    """Evaluate the best and the last checkpoint; the file appears when all is measured. Raises Failed."""
    target = work.result(run, part)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".part")
    flags = ["--attacks", attacks, "--eps", EPS, "--step-size", STEP, "--json", str(unfinished), "--quiet"]
    if images is not None:
        flags += ["--num-images", str(images)]
    check(*command(work, lock, run.name, ["eval", str(work.runs / run.name), *flags]))
    os.replace(unfinished, target)


def measure_cost(work: Work, lock: int) -> dict[str, float]:
    """Processor seconds per epoch by method: medians of epochs in alternation."""
    target = work.folder / "cost.json"
    if not target.exists():
        found: dict[str, list[float]] = {method: [] for method in COST_METHODS}
        for _ in range(COST_ROUNDS):
            for method in COST_METHODS:
                found[method].append(one_epoch(work, lock, Run(method, 100)))
        unfinished = target.with_suffix(".part")
        medians = {method: statistics.median(values) for method, values in found.items()}
        unfinished.write_text(json.dumps({"seconds": found, "median": medians}, indent=1) + "\n")
        os.replace(unfinished, target)
    median: dict[str, float] = json.loads(target.read_text())["median"]
    return median


def one_epoch(work: Work, lock: int, run: Run) -> float:
    """Processor seconds of the second epoch of a run of its own. Raises Failed."""
    folder = work.folder / "cost"
    flags = [*run.flags(work.data_dir, folder, 2, work.changed), "--overwrite", "--quiet"]
    code = f"{SECONDS}import sys; from fastdynat.commands.main import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, "train", *flags], pass_fds=(lock,), check=False)
    check(done.returncode, f"an epoch of {run.arm}, for its cost, ended with code {done.returncode}")
    rows = (folder / run.name / "metrics.jsonl").read_text().splitlines()
    return float(json.loads(rows[-1])["train_seconds"])


def steps(work: Work, lock: int) -> Iterator[tuple[str, Path, Callable[[], None]]]:
    """What is to be done, in order: a name, the file that shows that it is done, and the call."""
    for block in BLOCKS:
        for run in block.runs:
            yield run.name, work.result(run, "pgd20"), one_run(work, lock, run)
        if block.name == "autoattack":
            for run in BLOCKS[0].runs:
                yield f"{run.name}: AutoAttack", work.result(run, "autoattack"), robust(work, lock, run)


def one_run(work: Work, lock: int, run: Run) -> Callable[[], None]:
    """A training and its accuracies on the test images."""

    def call() -> None:
        epochs = work.epochs
        if run.arm == "madry-seconds":
            epochs = round(epochs * equal_seconds_epochs(measure_cost(work, lock)) / EPOCHS)
        train(work, lock, run, epochs)
        evaluate(work, lock, run, "pgd20", "clean,pgd20", work.test_images)

    return call


def robust(work: Work, lock: int, run: Run) -> Callable[[], None]:
    """AutoAttack and distances to the nearest adversarial images on the first test images."""
    return lambda: evaluate(
        work, lock, run, "autoattack", "clean,pgd20,fast-autoattack,fab-min", work.autoattack_images
    )


def run_all(work: Work, until: float | None = None, limit: int | None = None) -> int:
    """Do what is not yet done; returns how many steps were done. One that fails is left for the next start.

    Args:
        until: no step begins after this time (seconds since 1970).
        limit: stop after this many steps.
    """
    done = 0
    with alone(work.folder) as lock:
        for name, target, call in steps(work, lock):
            if target.exists():
                continue
            if (until is not None and time.time() > until) or done == limit:
                break
            print(f"{time.strftime('%m-%d %H:%M:%S')} {name}", flush=True)
            try:
                call()
                done += 1
            except Failed as error:
                print(f"{name} failed: {error}", flush=True)
    return done
