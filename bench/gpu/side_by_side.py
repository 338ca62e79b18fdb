"""Running several commands at once, each with a log of its own.

    python3 bench/gpu/side_by_side.py --out FOLDER [--until SECONDS] NAME COMMAND... ::: NAME COMMAND...

Prints how each command ended; the exit status is that of the first one. The others only fill caches: once the
first one has ended, they may run until SECONDS after the start. FOLDER gets NAME.log of each. SIGINT does not
end this program, since the commands, of the same process group, receive it too.
"""

import argparse
import signal
import subprocess
import sys
import time
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

    def end(self) -> None:
        """SIGINT, and SIGKILL 3 seconds later."""
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(3)
        except subprocess.TimeoutExpired:
            self.process.kill()


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
    parser.add_argument("--until", type=float, default=float("inf"), help="seconds since the start")
    parser.add_argument("words", nargs=argparse.REMAINDER)
    ours = parser.parse_args()
    ours.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGINT, lambda *_: None)  # not SIG_IGN, which the commands would inherit
    begin = time.monotonic()
    running = [start(words, ours.out) for words in split(ours.words)]
    first, *others = running
    while sum(command.look() for command in running) < len(running):
        if first.seconds is not None and time.monotonic() - begin > ours.until:
            for command in others:
                if command.seconds is None:
                    command.end()
        time.sleep(0.1)
    return first.process.returncode


if __name__ == "__main__":
    sys.exit(main())
