"""Consoles for results, progress and messages, and tables that show names as they are.

Names come from users, so rich reads no markup, emoji or numbers into them.
"""

import io
import sys
from contextlib import suppress
from functools import cache
from typing import Any

from rich.console import Console, ConsoleDimensions
from rich.progress import TextColumn
from rich.table import Table
from rich.text import Text

AS_IS: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}


UNBOUNDED = 100_000  # columns of a file or pipe: a table there is as wide as its content


class TerminalConsole(Console):
    """A console as wide as its terminal; a file or pipe has no width, so nothing is wrapped or cut there."""

    @property
    def size(self) -> ConsoleDimensions:
        size = super().size
        with suppress(AttributeError, ValueError):  # a file without isatty, or a closed one
            if self.file.isatty():
                return size
        return ConsoleDimensions(UNBOUNDED, size.height)

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        self._width, self._height = new_size

    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError; the command line decides how a command ends whose reader is gone."""
        raise


class _StandardError:
    """The current sys.stderr. Text that cannot be written (terminal or pipe gone) is lost, not the run."""

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


@cache
def output_console() -> Console:
    """The console of standard output, for results."""
    return TerminalConsole(**AS_IS)


@cache
def error_console() -> Console:
    """The console of standard error, for progress and messages."""
    file: Any = _StandardError()
    return TerminalConsole(file=file, **AS_IS)


def as_text(table: Table) -> str:
    """`table` as plain text, as wide as its content."""
    text = io.StringIO()
    TerminalConsole(file=text, color_system=None, **AS_IS).print(table)
    return text.getvalue().rstrip()


def plain_column(template: str) -> TextColumn:
    """A column of a progress bar, `template` formatted with the task."""
    return TextColumn(template, markup=False)


class PlainTable(Table):
    """A table that shows strings as they are."""

    def __init__(self, *headers: str, title: str | None = None, **options: Any) -> None:
        super().__init__(*headers, title=None if title is None else Text(title), **options)

    def add_column(self, header: Any = "", *args: Any, **options: Any) -> None:
        super().add_column(_plain(header), *args, **options)

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*map(_plain, cells), **options)


def _plain(value: Any) -> Any:
    return Text(value) if isinstance(value, str) else value
