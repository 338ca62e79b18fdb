"""How far an evaluation is: a bar with the remaining time for each attack, or a line now and then."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from fastdynat.terminal.consoles import AS_IS, plain_column

LINE_SECONDS = 30.0  # between lines where there is no terminal


class Meter:
    """Progress on `console`; a context manager around all attacks."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = Progress(
            plain_column("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            plain_column("eta"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )

    def __enter__(self) -> "Meter":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        self.console.print(text, **AS_IS, soft_wrap=True)

    @contextmanager
    def attack(self, title: str, images: int) -> Iterator[Callable[[float], None]]:
        """Follow one attack on `images` images; yields what is to be told how many more, or parts of one, are
        done.
        """
        task = self._bar.add_task(title, total=images)
        try:
            if self.console.is_terminal:
                yield lambda done: self._bar.advance(task, done)
            else:
                yield Lines(title, images, self.say).advance
        finally:
            self._bar.remove_task(task)


class Lines:
    """Says how far an attack is, at most every `LINE_SECONDS`."""

    def __init__(self, title: str, images: int, say: Callable[[str], None]) -> None:
        self.title, self.images, self.done = title, images, 0.0
        self._say = say
        self._start = self._said = time.monotonic()

    def advance(self, done: float) -> None:
        """`done` more images."""
        self.done += done
        now = time.monotonic()
        if now - self._said >= LINE_SECONDS and 0 < self.done < self.images:
            left = (now - self._start) * (self.images / self.done - 1)
            self._say(
                f"{self.title}: {self.done:,.0f} of {self.images:,} images, about {duration(left)} left"
            )
            self._said = now


def duration(seconds: float) -> str:
    """Seconds as 45 s, 3 min or 2 h 05 min.

    >>> duration(200)
    '3 min'
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
