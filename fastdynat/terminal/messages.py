"""Log messages of the package on the terminal."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from fastdynat.terminal.consoles import AS_IS

PACKAGE = "fastdynat"
MARKS = {logging.DEBUG: "debug: ", logging.WARNING: "warning: ", logging.ERROR: "error: "}
STYLES = {logging.DEBUG: "dim", logging.WARNING: "yellow", logging.ERROR: "red"}


class ConsoleHandler(logging.Handler):
    """Prints each record as one plain line: the message, marked where it is a warning or an error."""

    def __init__(self, console: Console, level: int, prefix: str = "") -> None:
        super().__init__(level)
        self.console, self.prefix = console, prefix

    def emit(self, record: logging.LogRecord) -> None:
        """Print `record` on the console."""
        try:
            mark = Text(MARKS.get(record.levelno, ""), style=STYLES.get(record.levelno, ""))
            self.console.print(mark + Text(self.prefix + self.format(record)), **AS_IS, soft_wrap=True)
        except BrokenPipeError:
            raise
        except Exception:
            self.handleError(record)


@contextmanager
def messages_shown(console: Console, level: str = "info", *, prefix: str = "") -> Iterator[None]:
    """Within it, log messages of the package from `level` on are printed on `console`, after `prefix`.

    The loggers' own level and handlers are as before afterwards.
    """
    logger, threshold = logging.getLogger(PACKAGE), logging.getLevelNamesMapping()[level.upper()]
    handler, before = ConsoleHandler(console, threshold, prefix), logger.level
    logger.addHandler(handler)
    logger.setLevel(min(threshold, logging.INFO))
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


class MessageCollector(logging.Handler):
    """While active, keeps the package's messages from level INFO on, whatever is printed of them.

    Attributes:
        texts: the messages, oldest first.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.texts: list[str] = []
        self._level = logging.NOTSET

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message of `record`."""
        self.texts.append(record.getMessage())

    def __enter__(self) -> "MessageCollector":
        logger = logging.getLogger(PACKAGE)
        self._level = logger.level
        if not logger.isEnabledFor(logging.INFO):
            logger.setLevel(logging.INFO)
        logger.addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        logger = logging.getLogger(PACKAGE)
        logger.removeHandler(self)
        logger.setLevel(self._level)
