"""Running tests in several processes, with a summary that survives hangs and crashes.

    python3 bench/gpu/shards.py --processes 8 --out FOLDER [--test-limit 60] [--expression gpu]
    tests/test_a.py ...

Every process takes each N-th test of the files (tests/support/outcome_lines.py) and writes a line when a test
begins and when it ends. One that hangs is ended after --test-limit seconds; a process that crashed, or whose
GPU context broke, goes on with the tests after the one that did it. SIGINT ends all and prints the summary.
Exit status 0: tests passed, none failed and none is left.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STARTS = 30  # of one process, at most
BROKEN = 75  # exit status of a process whose device is lost, see tests/support/outcome_lines.py
DONE = (0, 1, 5)  # pytest: passed, failed, none collected


@dataclass
class Shard:
    """One process, started again where tests break it. `told` is reset at each start."""

    index: int
    command: list[str]
    lines: Path
    log: Path
    env: dict[str, str]
    process: "subprocess.Popen[bytes] | None" = None
    starts: int = 0
    ended: str = ""  # why no other process follows; "" while there is one

    def start(self) -> None:
        self.starts += 1
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, env=self.env
            )

    def events(self) -> list[dict[str, Any]]:
        found = []
        with suppress(OSError):
            for line in self.lines.read_text(errors="replace").splitlines():
                with suppress(ValueError):
                    found.append(json.loads(line))
        return found

    def note(self, **event: Any) -> None:
        with self.lines.open("a") as file:
            file.write(json.dumps(event) + "\n")

    def running(self, events: list[dict[str, Any]]) -> dict[str, Any] | None:
        """The start of the test that has begun and has no outcome."""
        last = next((e for e in reversed(events) if e["event"] in ("start", "outcome")), None)
        return last if last is not None and last["event"] == "start" else None

    def step(self, test_limit: float) -> None:
        """Look after the process."""
        assert self.process is not None
        code, test = self.process.poll(), self.running(self.events())
        if code is None:
            if test is not None and time.time() - test["at"] > test_limit:
                end([self.process], 3)
                self.note(
                    event="outcome",
                    test=test["test"],
                    outcome="hung",
                    seconds=round(time.time() - test["at"], 1),
                )
                self._again("a test hung")
            return
        if code in DONE:
            self.ended = "done"
        elif test is not None:
            how = f"signal {-code}" if code < 0 else f"exit status {code}"
            self.note(event="outcome", test=test["test"], outcome="crashed", seconds=0, why=how)
            self._again(how)
        elif code == BROKEN:
            self._again("the GPU context broke")
        else:
            self.ended = f"exit status {code} outside of a test"

    def _again(self, why: str) -> None:
        if self.starts >= STARTS:
            self.ended = f"{why}, and it has been started {STARTS} times"
        else:
            self.start()


@dataclass
class Summary:
    """Counts by outcome, and what is not good, test by test."""

    counts: dict[str, int] = field(default_factory=dict)
    bad: list[dict[str, Any]] = field(default_factory=list)
    left: int = 0
    ended: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not self.bad and not self.left and not self.ended and self.counts.get("passed", 0) > 0

    def line(self) -> str:
        parts = [
            f"{count} {what}"
            for what, count in sorted(self.counts.items(), key=lambda item: item[0] != "passed")
        ]
        parts += [f"{self.left} not reached"] if self.left else []
        return ", ".join(parts) or "no test ran"


def summarize(shards: list[Shard]) -> Summary:
    summary = Summary()
    for shard in shards:
        events = shard.events()
        outcomes = [e for e in events if e["event"] == "outcome"]
        for e in outcomes:
            summary.counts[e["outcome"]] = summary.counts.get(e["outcome"], 0) + 1
        summary.bad += [e for e in outcomes if e["outcome"] not in ("passed", "skipped", "xfailed")]
        broken = {
            e["test"]: e for e in events if e["event"] == "not collected"
        }  # once, however often it was started
        summary.bad += broken.values()
        if broken:
            summary.counts["files not collected"] = summary.counts.get("files not collected", 0) + len(broken)
        collected = next((e["count"] for e in events if e["event"] == "collected"), None)
        if shard.ended not in ("done", "") or collected is None:
            summary.ended.append(
                f"process {shard.index}: {shard.ended or 'no tests collected'}; see {shard.log.name}"
            )
        summary.left += max(0, (collected or 0) - len(outcomes))
        if (test := shard.running(events)) is not None:
            summary.bad.append({"test": test["test"], "outcome": "running when time was up"})
    return summary


def end(processes: list["subprocess.Popen[bytes]"], grace: float) -> None:
    """SIGINT to all, then SIGKILL to those that are left."""
    until = time.monotonic() + grace
    for process in processes:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, until - time.monotonic()))
        with suppress(ProcessLookupError):
            process.kill()
        process.wait()


def show(summary: Summary, out: Path) -> None:
    document = {
        "counts": summary.counts,
        "not_reached": summary.left,
        "bad": summary.bad,
        "ended": summary.ended,
    }
    (out / "tests.json").write_text(json.dumps(document | {"line": summary.line()}, indent=1) + "\n")
    for bad in summary.bad:
        print(f"{bad['outcome'].upper()} {bad['test']}: {bad.get('why', '')}".rstrip(": "))
    for ended in summary.ended:
        print(ended)
    print(summary.line(), flush=True)


def shard(index: int, ours: argparse.Namespace) -> Shard:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "support.outcome_lines",
        "-p",
        "no:cacheprovider",
        "-m",
        ours.expression,
    ]
    command += ["-q", "-rA", "--tb=short", "--continue-on-collection-errors", *ours.files]
    lines, log = ours.out / f"tests-{index}.jsonl", ours.out / f"tests-{index}.log"
    env = dict(os.environ) | {
        "FASTDYNAT_SHARD": f"{index}/{ours.processes}",
        "FASTDYNAT_OUTCOMES": str(lines),
    }
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ours.processes)))
    lines.unlink(missing_ok=True)
    return Shard(index, command, lines, log, env)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--test-limit", type=float, default=60.0, help="time limit of one test in seconds")
    parser.add_argument("--expression", default="gpu", help="pytest's -m expression that selects the tests")
    parser.add_argument("files", nargs="+")
    ours = parser.parse_args()
    ours.out = ours.out.resolve()
    ours.out.mkdir(parents=True, exist_ok=True)
    shards = [shard(index, ours) for index in range(ours.processes)]
    try:
        for each in shards:
            each.start()
        while any(not each.ended for each in shards):
            time.sleep(0.2)
            for each in shards:
                if not each.ended:
                    each.step(ours.test_limit)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the summary is still to be written
        print("stopped", flush=True)
        end([each.process for each in shards if each.process is not None], 2)
    summary = summarize(shards)
    show(summary, ours.out)
    return 0 if summary.good else 1


if __name__ == "__main__":
    sys.exit(main())
