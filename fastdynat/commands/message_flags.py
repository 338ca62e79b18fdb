"""The flags that every command has which runs something: --log-level and --quiet."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fastdynat.errors import UserError
from fastdynat.launch import launched_rank

if TYPE_CHECKING:
    from rich.console import Console

Level = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True, kw_only=True)
class LevelFlag:
    """Messages on the terminal."""

    log_level: Level = "info"
    """Minimum severity of the log messages that are printed."""


@dataclass(frozen=True, kw_only=True)
class MessageFlags(LevelFlag):
    """Messages on the terminal."""

    quiet: bool = False
    """Print no progress, only notices, warnings and errors."""


@contextmanager
def printed_messages(level: Level, console: "Console", *, quiet: bool = False) -> Iterator[None]:
    """Within it, the package's log messages from `level` on are printed on `console`.

    Of several processes the first prints them, the others only errors, with their rank.

    Raises:
        UserError: `quiet` together with debug messages.
    """
    if quiet and level == "debug":
        raise UserError("--quiet and --log-level debug contradict each other; leave one of them out")
    from fastdynat.terminal.messages import messages_shown

    rank = launched_rank()
    with messages_shown(console, level if rank == 0 else "error", prefix=f"rank {rank}: " if rank else ""):
        yield
