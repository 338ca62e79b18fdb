"""One input at a time: the command runs in this process, and what must never happen is looked for."""

import contextlib
import hashlib
import io
import os
import resource
import shutil
import signal
import socket
import stat
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fastdynat.commands.main import main

LIMIT, TICK = 20, 5  # seconds of one command, and between two looks at it
MEMORY = 6 << 30  # bytes that a command may add to the address space
MAX_LINES = 12  # of standard error beside the refusal: notices
CODES = (0, 1, 2, 130)
# Files that a refused command may leave in a run: its lock, and results completed before the refusal.
FREE = (".lock", "evaluations", "report")


class Hang(BaseException):
    """The command took longer than LIMIT; not an Exception, so that nothing swallows it."""


@dataclass(frozen=True)
class Case:
    """One input: `prepare` puts files into an empty folder with a copy of the base, and returns the command.

    label: everything that is needed to make it again, for the report of a failure.
    environ: variables that are set, or with None unset, while the command runs.
    """

    kind: str
    label: str
    prepare: Callable[[Path], list[str]]
    environ: dict[str, str | None] = field(default_factory=dict)


@dataclass
class Tally:
    """Outcomes of the inputs: exit codes by kind, and failures as (kind, what, label)."""

    codes: Counter[tuple[str, int]] = field(default_factory=Counter)
    failures: list[tuple[str, str, str]] = field(default_factory=list)

    def table(self) -> str:
        """A line for each kind, then a line for each sort of failure."""
        kinds = sorted({kind for kind, _ in self.codes} | {kind for kind, _, _ in self.failures})
        lines = [f"{'kind':<10}{'inputs':>8}{'exit 0':>8}{'exit 1':>8}{'exit 2':>8}{'failures':>10}"]
        for kind in kinds:
            failed = sum(k == kind for k, _, _ in self.failures)
            counts = [self.codes[kind, code] for code in CODES[:3]]
            lines.append(
                f"{kind:<10}{sum(counts) + failed:>8}" + "".join(f"{n:>8}" for n in counts) + f"{failed:>10}"
            )
        lines.append(f"{sum(self.codes.values()) + len(self.failures)} inputs, {len(self.failures)} failures")
        for (kind, what), count in Counter((kind, what) for kind, what, _ in self.failures).most_common():
            example = next(label for k, w, label in self.failures if (k, w) == (kind, what))
            lines.append(f"{count:>5}  {kind}: {what}\n       {example}")
        return "\n".join(lines)


def digests(folder: Path) -> dict[str, str]:
    """Digest of every entry under `folder`: links and pipes by kind, files by content."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root, name)
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                found[str(path.relative_to(folder))] = f"-> {os.readlink(path)}"
            elif stat.S_ISREG(mode) and path.stat().st_size < 64 << 20:
                found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                found[str(path.relative_to(folder))] = f"kind {stat.S_IFMT(mode):o}"
    return found


def attempt(case: Case, base: Path, tally: Tally) -> None:
    """Run `case` on a copy of `base` and put what came of it into `tally`."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    canary = folder / "canary"
    here = Path.cwd()
    try:
        work = Path(shutil.copytree(base, folder / "w", symlinks=True))
        os.chdir(work)
        os.environ["FUZZ_CANARY"] = str(canary)
        argv = case.prepare(work)
        before = digests(work)
        with _environment(case.environ):
            code, problem = _command(argv)
        if canary.exists():
            problem = "code of a file was executed"
        elif problem is None and code == 2:
            problem = _changed(before, digests(work))
        label = f"{case.label}: fastdynat {' '.join(argv)}"
        if problem is None:
            tally.codes[case.kind, code] += 1
        else:
            tally.failures.append(
                (case.kind, problem, label.encode("utf-8", "backslashreplace").decode()[:600])
            )
    finally:
        os.chdir(here)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _environment(changes: dict[str, str | None]) -> Iterator[None]:
    with mock.patch.dict(os.environ, {key: value for key, value in changes.items() if value is not None}):
        for key, value in changes.items():
            if value is None:
                os.environ.pop(key, None)
        yield


def _changed(before: dict[str, str], after: dict[str, str]) -> str | None:
    lost = [
        name for name in before if after.get(name) != before[name] and not set(Path(name).parts) & set(FREE)
    ]
    return f"a refused command changed {lost[0]}" if lost else None


def _command(argv: list[str]) -> tuple[int, str | None]:
    """The exit code, and the defect in the command's end, or None."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    previous = signal.signal(signal.SIGALRM, _Watchdog())
    signal.setitimer(signal.ITIMER_REAL, TICK, TICK)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = main(argv)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except Hang as hang:
        return 0, f"took more than {LIMIT} s at {_place(hang)}"
    except BaseException as error:  # what a user would see as a traceback
        return 0, f"{type(error).__name__} at {_place(error)}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    return code, _bad_ending(code, err.getvalue())


class _Watchdog:
    """Raise Hang after LIMIT seconds of waiting, or of processor time, which other load does not change."""

    def __init__(self) -> None:
        self.begin, self.start = time.monotonic(), time.process_time()
        self.before = self.start

    def __call__(self, *_: Any) -> None:
        now, idle = time.process_time(), time.process_time() - self.before < 0.02 * TICK
        self.before = now
        if time.monotonic() - self.begin > LIMIT - 0.1 and (idle or now - self.start > LIMIT):
            raise Hang


def _place(error: BaseException) -> str:
    """The last line of ours in the traceback, then the last of all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/fastdynat/" in frame.filename] or frames
    places = [
        f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}" for frame in (ours[-1], frames[-1])
    ]
    return " > ".join(dict.fromkeys(places))


def _bad_ending(code: int, err: str) -> str | None:
    lines = err.strip().splitlines()
    if code not in CODES:
        return f"exit code {code}"
    if "Traceback" in err:
        return f"a traceback was printed, ending in {lines[-1][:120]}"
    if code != 2:
        return None
    refusals = [line for line in lines if line.startswith("fastdynat: error: ")]
    if len(refusals) != 1 or lines[-1] != refusals[0]:
        return f"the refusal is not one last line: {lines[-1][:80] if lines else 'nothing'}"
    return f"{len(lines)} lines on standard error" if len(lines) > MAX_LINES else None


@contextlib.contextmanager
def sandbox() -> Iterator[None]:
    """No network, little memory, and of accepted training runs only the start and at most one tiny epoch."""
    from fastdynat.training.trainer import Outcome, Trainer

    real = Trainer.fit

    def fit(self: Any) -> Any:
        c = self.config
        tiny = (
            c.model.model == "small"
            and c.attack.steps <= 2
            and self.loader.steps_per_epoch <= 4
            and c.method != "dyart"
        )
        if not tiny or c.optim.epochs > 3:
            return Outcome(True)
        return real(self)

    def unreachable(*_: Any) -> None:
        raise OSError(101, "Network is unreachable")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    try:
        with mock.patch.object(Trainer, "fit", fit), mock.patch.object(socket.socket, "connect", unreachable):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        torch.set_num_threads(threads)
