"""Where results, progress and messages are printed. Names come from users: rich reads no markup, emoji or
numbers into them.
"""

import sys
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.progress import TextColumn
from rich.table import Table
from rich.text import Text

AS_IS: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}


class _OutputConsole(Console):
    """Leaves it to the command line how a command ends whose reader went away."""

    def on_broken_pipe(self) -> None:
        raise


class _StandardError:
    """sys.stderr as it is now; what cannot be written (its terminal or pipe is gone) is lost, and not the
    training.
    """

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._file().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._file().flush()

    def _file(self) -> Any:
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file(), name)


def output_console(width: int | None) -> Console:
    """Standard output, for results; `width` characters where it is no terminal, None for rich's 80."""
    return _OutputConsole(width=None if sys.stdout.isatty() else width, **AS_IS)


def error_console() -> Console:
    """Standard error, so that standard output stays for results; wide enough for whole lines when it is not a
    terminal.
    """
    file: Any = _StandardError()
    console = Console(file=file, **AS_IS)
    return console if console.is_terminal else Console(file=file, width=240, **AS_IS)


def quiet_console() -> Console:
    """Prints nothing."""
    return Console(quiet=True, **AS_IS)


def plain_column(template: str) -> TextColumn:
    """A column of a progress bar; `template` is formatted with the task."""
    return TextColumn(template, markup=False)


class PlainTable(Table):
    """A table whose strings are shown as they are, on any console."""

    def __init__(self, *headers: str, title: str | None = None, **options: Any) -> None:
        super().__init__(*headers, title=None if title is None else Text(title), **options)

    def add_column(self, header: Any = "", *args: Any, **options: Any) -> None:
        super().add_column(_plain(header), *args, **options)

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*map(_plain, cells), **options)


def _plain(value: Any) -> Any:
    return Text(value) if isinstance(value, str) else value
