"""Running several commands at once, each with a log of its own.

    python3 bench/gpu/side_by_side.py --out FOLDER NAME COMMAND... ::: NAME COMMAND... ::: ...

Prints how each one ended. The first command decides: the exit status is its own, and what the others do says
nothing about the machine: they fill caches. SIGINT goes to all. FOLDER gets NAME.log of each.
"""

import argparse
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

BETWEEN = ":::"


@dataclass
class Command:
    """A running command."""

    name: str
    process: "subprocess.Popen[bytes]"
    begin: float
    seconds: float | None = None

    def look(self) -> bool:
        """True once it has ended; says so the first time."""
        if self.seconds is None and self.process.poll() is not None:
            self.seconds = time.monotonic() - self.begin
            print(f"{self.name}: exit status {self.process.returncode}, {self.seconds:.1f} s", flush=True)
        return self.seconds is not None


def split(words: list[str]) -> list[list[str]]:
    """`words` without the separators, a list for each command."""
    found: list[list[str]] = [[]]
    for word in words:
        if word == BETWEEN:
            found.append([])
        else:
            found[-1].append(word)
    return [command for command in found if command]


def start(words: list[str], out: Path) -> Command:
    name, *command = words
    with (out / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    return Command(name, process, time.monotonic())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("words", nargs=argparse.REMAINDER)
    ours = parser.parse_args()
    ours.out.mkdir(parents=True, exist_ok=True)
    running = [start(words, ours.out) for words in split(ours.words)]
    try:
        while sum(command.look() for command in running) < len(running):
            time.sleep(0.1)
    except KeyboardInterrupt:  # sent to this process alone or to all
        for command in running:
            with suppress(ProcessLookupError):
                command.process.send_signal(signal.SIGINT)
        for command in running:
            command.process.wait()
            command.look()
    return running[0].process.returncode


if __name__ == "__main__":
    sys.exit(main())
