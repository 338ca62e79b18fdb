"""The same training by one process and by several: metrics, weights and memory side by side, as JSON.

    python bench/world_sizes.py --json OUT.json --sizes 1,2 -- --data digits --model small --epochs 2

What follows ``--`` are flags of `fastdynat train`. Each size runs in a folder of its own under --work; the
several processes are started by torchrun, with --threads threads each (by default the machine's cores shared
out, and all of them for one process). With --interrupt S the last size is also run in two pieces: it gets
Ctrl-C S seconds after its first checkpoint and goes on with ``--resume auto``.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from fastdynat.runs import describe_environment, newest_checkpoint, source_commit
from fastdynat.training.training_state import read_training_state


class PeakOfProcesses:
    """The most resident memory of each process below this one that trains, looked at twice a second."""

    def __init__(self) -> None:
        self.peaks: dict[int, int] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakOfProcesses":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def ranks(self, count: int) -> list[float]:
        """GiB of the `count` processes that held most, which are the ranks, not their loader workers."""
        return [round(peak / 2**20, 3) for peak in sorted(self.peaks.values(), reverse=True)[:count]]

    def _watch(self) -> None:
        while not self._done.wait(0.5):
            for status in Path("/proc").glob("[0-9]*/status"):
                with suppress(OSError, StopIteration, ValueError):
                    command = (status.parent / "cmdline").read_text()
                    if "fastdynat\0train" not in command or "torch.distributed.run" in command:
                        continue
                    line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
                    pid, held = int(status.parent.name), int(line.split()[1])
                    self.peaks[pid] = max(held, self.peaks.get(pid, 0))


def command(size: int, flags: list[str]) -> list[str]:
    """The command line that trains by `size` processes."""
    train = ["-m", "fastdynat", "train", *flags]
    if size == 1:
        return [sys.executable, *train]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), *train]


def run(
    size: int, flags: list[str], folder: Path, threads: int, *, interrupt: float | None
) -> dict[str, Any]:
    """Train in `folder`; returns what a reader wants to compare."""
    shutil.rmtree(folder, ignore_errors=True)
    own = [*flags, "--run-dir", str(folder), "--resume", "auto"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    began, stopped = time.perf_counter(), None
    with PeakOfProcesses() as memory:
        if interrupt is not None:
            process = subprocess.Popen(command(size, own), env=environment)
            while process.poll() is None and newest(folder) is None:
                time.sleep(0.2)
            with suppress(subprocess.TimeoutExpired):
                process.wait(interrupt)
            process.send_signal(signal.SIGINT)
            process.wait()
            stopped = _place(folder)
        subprocess.run(command(size, own), env=environment, check=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "processes": size,
        "threads_each": threads,
        "wall_s": round(time.perf_counter() - began, 1),
        "peak_gib_by_process": memory.ranks(size),
        "interrupted_at": stopped,
        "metrics": rows,
    }


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in `folder`, if there is one."""
    return newest_checkpoint(folder) if (folder / "config.yaml").exists() else None


def _place(folder: Path) -> dict[str, int]:
    """Epoch and step of the newest checkpoint."""
    last = newest(folder)
    assert last is not None, "ended before its first checkpoint"
    state = read_training_state(last / "state.pt")
    return {key: state[key] for key in ("epoch", "epoch_step")}


def largest_difference(one: Path, other: Path) -> float:
    """The largest difference of a weight of the last checkpoints."""
    a, b = (load_file(folder / "last" / "model.safetensors") for folder in (one, other))
    return max(float((a[key].double() - b[key].double()).abs().max()) for key in a)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--sizes", default="1,2")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("world-sizes"))
    parser.add_argument("--interrupt", type=float)
    parser.add_argument("flags", nargs="*", help="of fastdynat train, after --")
    given = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    sizes = [int(size) for size in given.sizes.split(",")]
    jobs = [(f"{size}", size, None) for size in sizes]
    jobs += [(f"{sizes[-1]}-interrupted", sizes[-1], given.interrupt)] * (given.interrupt is not None)
    runs, first = [], given.work / jobs[0][0]
    for name, size, interrupt in jobs:
        done = run(
            size, given.flags, given.work / name, given.threads or max(1, cores // size), interrupt=interrupt
        )
        done["weights_differ_from_first_by"] = largest_difference(first, given.work / name)
        runs.append(done)
        document = {
            "format": "fastdynat-world-sizes/1",
            "command": f"python bench/world_sizes.py --sizes {given.sizes} -- {' '.join(given.flags)}",
            "environment": describe_environment() | {"load_average": os.getloadavg()},
            "commit": source_commit(),
            "runs": runs,
        }
        given.json.write_text(json.dumps(document, indent=1) + "\n")
        print(json.dumps({key: value for key, value in done.items() if key != "metrics"}))


if __name__ == "__main__":
    main()
