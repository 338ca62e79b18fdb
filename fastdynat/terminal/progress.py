"""Progress of long work: bars on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TimeElapsedColumn, TimeRemainingColumn

from fastdynat.terminal.consoles import AS_IS, plain_column

LINE_SECONDS = 30.0  # between lines where there is no terminal


class ProgressDisplay:
    """Bars and lines of progress on `console`; a quiet one shows neither.

    On a terminal each open task is a bar, which disappears when the task ends. Elsewhere a task that counts a
    `unit` prints a line every `LINE_SECONDS`.
    """

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self.console, self.quiet = console, quiet
        self._bars = Progress(
            plain_column("{task.description}"),
            BarColumn(bar_width=24),
            plain_column("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            plain_column("eta"),
            TimeRemainingColumn(elapsed_when_finished=False),
            plain_column("{task.fields[note]}"),
            console=console,
            disable=quiet or not console.is_terminal,
            transient=True,
        )

    def line(self, text: str) -> None:
        """Print a line of progress, above the bars."""
        if not self.quiet:
            self.console.print(text, **AS_IS, soft_wrap=True)

    @contextmanager
    def task(
        self, title: str, total: float, *, completed: int = 0, unit: str | None = None
    ) -> Iterator["ProgressTask"]:
        """Follow work of `total` steps, `completed` of which are done.

        unit: what the steps are, such as "images"; None prints no lines where there is no terminal.
        """
        if not self._bars.tasks:
            self._bars.start()
        bar = self._bars.add_task(title, total=total, completed=completed, note="")
        try:
            yield ProgressTask(self, self._bars, bar, unit)
        finally:
            self._bars.remove_task(bar)
            if not self._bars.tasks:
                self._bars.stop()


class ProgressTask:
    """Work in progress, made by `ProgressDisplay.task`."""

    def __init__(self, display: ProgressDisplay, bars: Progress, bar: TaskID, unit: str | None) -> None:
        self._display, self._bars, self._bar, self._unit = display, bars, bar, unit
        task = next(task for task in bars.tasks if task.id == bar)
        self._task, self._first = task, task.completed
        self._start = self._printed = time.monotonic()

    def advance(self, amount: float) -> None:
        """Count `amount` more steps as done."""
        self._bars.advance(self._bar, amount)
        self._print_line()

    def update(
        self, *, completed: float | None = None, title: str | None = None, note: str | None = None
    ) -> None:
        """Set the number of completed steps, the title, or the note behind the bar; None leaves it."""
        self._bars.update(self._bar, completed=completed, description=title)
        if note is not None:
            self._bars.update(self._bar, note=note)
        self._print_line()

    def _print_line(self) -> None:
        now, done, total = time.monotonic(), self._task.completed, self._task.total or 0.0
        if self._unit is None or self._display.console.is_terminal or now - self._printed < LINE_SECONDS:
            return
        if self._first < done < total:
            left = (now - self._start) * (total - done) / (done - self._first)
            self._display.line(
                f"{self._task.description}: {done:,.0f} of {total:,.0f} {self._unit}, "
                f"about {duration(left)} left"
            )
            self._printed = now


def duration(seconds: float) -> str:
    """Seconds as 45 s, 3 min or 2 h 05 min.

    >>> duration(200)
    '3 min'
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
