"""Running the parts of a check in turn, each under a time limit, with results kept up to date on disk."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

GRACE = 6.0  # seconds from SIGINT, at which programs write what they have, to SIGKILL
USEFUL = 15.0  # a part without seconds of its own runs if so many are left
TAIL = 6  # lines of a log that are shown


class Stopped(BaseException):
    """This process was told to stop."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One command.

    Attributes:
        seconds: it may always take so long, GRACE included; 0: it runs only in what the parts before it left.
        command: or a function that returns it, called when the part begins.
        key: its result in a few words, read from the folder of results.
        unable: of the line in its log that says that this machine cannot run it, which is no failure.
        bad: regular expressions of the lines in its log that say that it found an error; it then failed,
            however it ended.
        why_not: why it is left out, "" where it is not.
        tick: called about once a second while it runs.
        end: called when its command has ended, however it did.
        grace: seconds from SIGINT to SIGKILL, of `seconds`.
        ends_by_time: reaching the limit is a usual end ("stopped"), no failure.
        good_codes: exit statuses that are no failure.
        most: its limit is never above that.
    """

    name: str
    seconds: float
    command: Sequence[str] | Callable[[], Sequence[str]]
    env: Mapping[str, str] = field(default_factory=dict)
    key: Callable[[Path], str] = lambda folder: ""
    unable: tuple[str, ...] = ()
    bad: tuple[str, ...] = ()
    why_not: str = ""
    tick: Callable[[], object] = lambda: None
    end: Callable[[], object] = lambda: None
    grace: float = GRACE
    ends_by_time: bool = False
    good_codes: tuple[int, ...] = (0,)
    most: float = float("inf")


@dataclass
class Outcome:
    """Outcome of a part: ok, stopped, failed, timed out, interrupted, skipped (`key` says why) or not run."""

    name: str
    status: str = "not run"
    seconds: float = 0.0
    limit: float = 0.0
    code: int | None = None
    key: str = ""

    @property
    def good(self) -> bool:
        return self.status in ("ok", "stopped", "skipped")


class Check:
    """Runs parts and keeps `NAME.json` and `NAME.txt` in `out` up to date."""

    def __init__(
        self,
        name: str,
        parts: Sequence[Part],
        *,
        total: float,
        work: Path,
        out: Path,
        cwd: Path,
        env: Mapping[str, str],
    ) -> None:
        if (least := sum(part.seconds for part in parts)) >= total:
            raise ValueError(f"the parts' limits add up to {least:g} s, which is not less than {total:g} s")
        self.name, self.parts, self.total = name, parts, total
        self.work, self.out, self.cwd, self.env = work, out, cwd, dict(env)
        self.begin = time.monotonic()
        self.outcomes = [Outcome(part.name) for part in parts]
        self.about: dict[str, Any] = {}
        self.words: list[str] = []

    def say(self, text: str) -> None:
        """Print and keep a remark."""
        self.words.append(text)
        print(f"{self.name}: {text}", flush=True)

    def left(self) -> float:
        return self.total - (time.monotonic() - self.begin)

    def limit(self, index: int) -> float:
        """Seconds for a part that begins now: its own and those left by earlier parts."""
        return min(
            self.parts[index].most, self.left() - sum(part.seconds for part in self.parts[index + 1 :])
        )

    def run(self, after: Callable[[], object] = lambda: None) -> bool:
        """Run all parts; `after` each one, results are stored. Returns whether all are good.

        Raises:
            Stopped: by a signal; the running part was ended, and what is there is stored.
        """
        self.store()
        for index, part in enumerate(self.parts):
            outcome = self.outcomes[index]
            try:
                self._run(part, outcome, self.limit(index))
            finally:
                outcome.seconds, outcome.limit = round(outcome.seconds, 1), round(outcome.limit, 1)
                print(f"== {part.name}: {outcome.status}, {outcome.seconds:g} s {outcome.key}", flush=True)
                self.store()
                after()
        return all(outcome.good for outcome in self.outcomes)

    def _run(self, part: Part, outcome: Outcome, limit: float) -> None:
        if part.why_not:
            outcome.status, outcome.key = "skipped", part.why_not
            return
        if limit < (part.grace + 1 if part.seconds else USEFUL):
            outcome.key = "no time was left"
            if not part.seconds:
                outcome.status = "skipped"
            return
        print(f"== {part.name}: at most {limit:.0f} s", flush=True)
        begin, log = time.monotonic(), self.work / f"{part.name}.log"
        try:
            code, outcome.status = self._attempt(part, log, begin + limit)
        except Stopped:
            outcome.status = "interrupted"
            raise
        finally:
            outcome.seconds, outcome.limit = time.monotonic() - begin, limit
            text = log.read_text(errors="replace") if log.exists() else ""
            print("\n".join(text.splitlines()[-TAIL:]), flush=True)
            outcome.key = self._key(part)
        outcome.code = code
        said = [line.strip() for line in text.splitlines() if not line.startswith("$ ")]
        line = next((line for line in said if any(mark in line for mark in part.unable)), None)
        if line is not None and outcome.status != "ok":
            outcome.status, outcome.key = "skipped", f"this machine cannot run it: {line[:120]}"
        found = next((line for line in said if any(re.search(mark, line) for mark in part.bad)), None)
        if found is not None:
            outcome.status, outcome.key = "failed", f"{found[:120]}; {outcome.key}"

    def _attempt(self, part: Part, log: Path, end: float) -> tuple[int | None, str]:
        try:
            command = part.command() if callable(part.command) else part.command
            return self._command(command, part, log, end)
        except (OSError, ValueError) as error:  # a program that is not there
            with log.open("a") as file:
                file.write(f"{error}\n")
            return None, "failed"

    def _command(self, command: Sequence[str], part: Part, log: Path, end: float) -> tuple[int, str]:
        env = self.env | dict(part.env)
        with log.open("ab") as file:
            file.write(f"$ {' '.join(command)}\n".encode())
            file.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                cwd=self.cwd,
                env=env,
                start_new_session=True,
            )
        late = False
        try:
            while process.poll() is None and not late:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(min(1.0, max(0.05, end - part.grace - time.monotonic())))
                with suppress(OSError, ValueError):  # a file that is being written
                    part.tick()
                late = time.monotonic() >= end - part.grace
        finally:
            late = late and process.poll() is None
            finish(process, part.grace - 1)
            part.end()
        if late:
            return process.returncode, "stopped" if part.ends_by_time else "timed out"
        return process.returncode, "ok" if process.returncode in part.good_codes else "failed"

    def _key(self, part: Part) -> str:
        try:
            return part.key(self.work)
        except (OSError, ValueError, LookupError, TypeError, ArithmeticError, AttributeError) as error:
            return f"no figure: {type(error).__name__}: {str(error)[:80]}"

    def document(self) -> dict[str, Any]:
        return {
            "format": f"fastdynat-{self.name.replace('_', '-')}/1",
            **self.about,
            "seconds": round(self.total - self.left(), 1),
            "limit": self.total,
            "parts": [asdict(outcome) for outcome in self.outcomes],
            "remarks": self.words,
        }

    def table(self) -> str:
        """The parts as text."""
        rows = [("part", "status", "seconds", "limit", "key figure")]
        rows += [(o.name, o.status, f"{o.seconds:g}", f"{o.limit:g}", o.key) for o in self.outcomes]
        wide = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            f"{a:<{wide[0]}}  {b:<{wide[1]}}  {c:>{wide[2]}}  {d:>{wide[3]}}  {e}".rstrip()
            for a, b, c, d, e in rows
        ]
        counts = [
            f"{n} {what}"
            for what in dict.fromkeys(o.status for o in self.outcomes)
            if (n := self._count(what))
        ]
        about = [f"{key}: {value}" for key, value in self.about.items() if isinstance(value, str)]
        done = (
            f"{len(self.parts)} parts: {', '.join(counts)}; {self.total - self.left():.0f} of "
            f"{self.total:g} s"
        )
        return "\n".join([*about, *(f"remark: {word}" for word in self.words), "", *lines, done])

    def _count(self, status: str) -> int:
        return sum(outcome.status == status for outcome in self.outcomes)

    def store(self) -> None:
        """Write what there is. A full disk is said and ends nothing."""
        try:
            write(self.out / f"{self.name}.json", (json.dumps(self.document(), indent=1) + "\n").encode())
            write(self.out / f"{self.name}.txt", (self.table() + "\n").encode())
        except OSError as error:
            print(f"{self.name}: results not stored: {error}", flush=True)


def finish(process: subprocess.Popen[bytes], grace: float) -> None:
    """End a process and its session's processes: SIGINT, so that it writes its results, then SIGKILL."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def write(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step."""
    part = path.with_name(path.name + ".new")
    part.write_bytes(data)
    part.replace(path)


def stop_at_signals() -> None:
    """SIGINT, SIGTERM and SIGHUP raise Stopped. They are taken even where they were ignored (nohup, a
    script's background), or every program that this one starts would ignore them too.
    """

    def stop(number: int, frame: object) -> None:
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(each, signal.SIG_IGN)  # once: what follows is the storing of results
        raise Stopped(signal.Signals(number).name)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
