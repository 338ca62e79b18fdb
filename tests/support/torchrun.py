"""`fastdynat train` on several processes of this machine, started by torchrun; what it says and leaves."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# Words of torchrun's own report, which follows that of the processes.
OF_TORCHRUN = (
    "W",
    "E",
    "I",
    "  ",
    "---",
    "===",
    "Traceback",
    "torch.distributed.elastic",
    "fastdynat FAILED",
)
TINY = (
    *("--data", "digits", "--model", "small-gn", "--method", "madry", "--steps", "1"),
    *("--train-size", "64", "--val-size", "20", "--batch-size", "16", "--augment", "none"),
)


@dataclass(frozen=True)
class Ended:
    """What a torchrun has left: its exit code, the lines of fastdynat, and everything that was said."""

    code: int
    lines: list[str]
    said: str
    seconds: float

    @property
    def errors(self) -> list[str]:
        """The lines in which fastdynat reports an error."""
        return [
            line for line in self.lines if line.startswith(("fastdynat: error", "fastdynat: interrupted"))
        ]


class Torchrun:
    """A torchrun that has begun; a context that leaves no process behind.

    Attributes:
        process: torchrun itself, the parent of the ranks.
    """

    def __init__(
        self, *arguments: object, ranks: int = 2, options: tuple[str, ...] = (), script: Path | None = None
    ) -> None:
        """
        Args:
            arguments: of `fastdynat`, or of `script`.
            options: of torchrun.
            script: what to run in the place of `fastdynat`.
        """
        what = ["-m", "fastdynat"] if script is None else [str(script)]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]  # on a free port
        launcher += ["--nproc-per-node", str(ranks), *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._begin = time.monotonic()
        self.process = subprocess.Popen(
            [*launcher, *what, *map(str, arguments)],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )

    def __enter__(self) -> "Torchrun":
        return self

    def __exit__(self, *error: object) -> None:
        ranks = self.pids()
        for pid in [self.process.pid, *ranks.values()]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.communicate()

    def pids(self) -> dict[int, int]:
        """The processes of the ranks that are running."""
        found = {}
        for folder in Path("/proc").iterdir():
            try:
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                names = (folder / "environ").read_bytes().split(b"\0")
            except (OSError, IndexError):
                continue
            rank = [int(name[5:]) for name in names if name.startswith(b"RANK=")]
            if parent == str(self.process.pid) and rank:
                found[rank[0]] = int(folder.name)
        return found

    def wait_for(self, path: Path, seconds: float = 120) -> None:
        """Wait until `path` exists. Raises AssertionError where torchrun ends before."""
        until = time.monotonic() + seconds
        while not path.exists():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < until
            time.sleep(0.02)

    def end(self, seconds: float = 150) -> Ended:
        """Wait for the end. Raises subprocess.TimeoutExpired."""
        said = self.process.communicate(timeout=seconds)[0]
        lines = [line for line in said.splitlines() if line and not line.startswith(OF_TORCHRUN)]
        return Ended(self.process.returncode, lines, said, time.monotonic() - self._begin)


def torchrun(*arguments: object, ranks: int = 2, **options: object) -> Ended:
    """Run it to its end."""
    with Torchrun(*arguments, ranks=ranks, **options) as running:  # type: ignore[arg-type]
        return running.end()
