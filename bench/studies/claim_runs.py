"""Makes the runs of the study. Several runners share a folder; whatever is killed goes on where it was."""

import fcntl
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from claim_design import AUTOATTACK_IMAGES, BLOCKS, EPOCHS, EPS, RUNS, STEP, Run, equal_seconds_epochs

from fastdynat.runs import source_commit

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
        earlier: the collected document of runs made before, maybe on another machine; empty without one.
    """

    folder: Path
    data_dir: str
    epochs: int = EPOCHS
    autoattack_images: int = AUTOATTACK_IMAGES
    test_images: int | None = None
    changed: Mapping[str, str] = field(default_factory=dict)
    earlier: Mapping[str, Any] = field(default_factory=dict)

    @property
    def runs(self) -> Path:
        """The folder of run directories."""
        return self.folder / "runs"

    def result(self, run: Run, part: str) -> Path:
        """The file of a finished measurement."""
        return self.folder / "results" / f"{run.name}.{part}.json"

    def made_here(self, run: Run) -> bool:
        """True if `run` and all measurements of it are finished in this folder."""
        return all(self.result(run, part).exists() for part in measurements(run))

    def made_earlier(self, run: Run) -> bool:
        """True if the earlier document has `run` and all measurements of it."""
        later = self.earlier.get("follow_up", {}).get("runs", {})
        found = (self.earlier.get("runs", {}) | later).get(run.name, {})
        return all(COLLECTED[part] in found for part in measurements(run))


# What a run's measurements are called in the collected document.
COLLECTED = {"pgd20": "test", "autoattack": "robust"}


def measurements(run: Run) -> tuple[str, ...]:
    """On the test images. AutoAttack is for the first block, right after each run: weights do not travel."""
    return ("pgd20", "autoattack") if run in BLOCKS[0].runs else ("pgd20",)


@contextmanager
def claimed(work: Work, name: str, *, wait: bool = False) -> Iterator[int | None]:
    """Hold `name` against other runners, and against a training that one has left behind.

    Yields a descriptor, which is passed on to the commands: they hold the lock as long as they live. None if
    another one holds it; with `wait` that is waited for.
    """
    folder = work.folder / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
            return
        yield file.fileno()


def command(work: Work, lock: int, name: str, arguments: list[str]) -> tuple[int, str]:
    """Run ``fastdynat``; returns its exit status and messages. Notes processor seconds in segments.jsonl."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    log = work.folder / "messages" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    # Messages go to a file, not a pipe, so that a command outlives a runner that is killed.
    with log.open("a+") as messages:
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


def measure_cost(work: Work) -> dict[str, float]:
    """Processor seconds per epoch by method: medians of epochs in alternation, measured once."""
    if known := work.earlier.get("cost"):
        return dict(known["median"])
    target = work.folder / "cost.json"
    with claimed(work, "cost", wait=True) as lock:
        assert lock is not None
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


def make(work: Work, lock: int, run: Run) -> None:
    """A training and its accuracies on the test images. Raises Failed."""
    if not work.result(run, "pgd20").exists():
        epochs = work.epochs
        if run.arm == "madry-seconds":
            epochs = round(epochs * equal_seconds_epochs(measure_cost(work)) / EPOCHS)
        if guide := started_from(run):
            make_guide(work, guide)
        train(work, lock, run, epochs)
        note_commit(work, run)
        evaluate(work, lock, run, "pgd20", "clean,pgd20", work.test_images)
    if "autoattack" in measurements(run):
        evaluate(work, lock, run, "autoattack", "clean,pgd20,fast-autoattack,fab-min", work.autoattack_images)


def note_commit(work: Work, run: Run) -> None:
    """Store the commit of the package that made `run`."""
    target = work.result(run, "made")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"commit": source_commit()}) + "\n")


def started_from(run: Run) -> Run | None:
    """The run whose weights `run` starts from."""
    return Run("guide", run.seed, run.images) if run.arm == "guide-before" else None


def make_guide(work: Work, guide: Run) -> None:
    """Train `guide`, whose weights another run starts from, if it is not finished in this folder."""
    with claimed(work, guide.name, wait=True) as lock:
        assert lock is not None
        if not work.made_here(guide):
            train(work, lock, guide, work.epochs)
            note_commit(work, guide)


def run_all(
    work: Work, until: float | None = None, limit: int | None = None, *, runs: Sequence[Run] = RUNS
) -> int:
    """Make those of `runs` that are not yet there; returns how many were made.

    Runs that another runner makes, or that need one of these, are left for a second round, which waits: that
    runner may have been killed. A run that fails is left for the next start.

    Args:
        until: no run begins after this time (seconds since 1970).
        limit: stop after this many runs.
    """
    done, left = 0, [run for run in runs if not work.made_earlier(run)]
    for wait in (False, True):
        begun, left = left, []
        for run in begun:
            if (until is not None and time.time() > until) or done == limit:
                return done
            if not wait and is_held(work, started_from(run)):
                left.append(run)
                continue
            if wait and is_held(work, run):
                print(f"{run.name}: waiting for the command that makes it", flush=True)
            with claimed(work, run.name, wait=wait) as lock:
                if lock is None:
                    left.append(run)
                    continue
                if work.made_here(run):
                    continue
                print(f"{time.strftime('%m-%d %H:%M:%S')} {run.name}", flush=True)
                try:
                    make(work, lock, run)
                    done += 1
                except Failed as error:
                    print(f"{run.name} failed: {error}", flush=True)
    return done


def is_held(work: Work, run: Run | None) -> bool:
    """True if another runner makes `run`."""
    if run is None:
        return False
    with claimed(work, run.name) as lock:
        return lock is None
