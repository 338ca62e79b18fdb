"""Ends of `Trainer.fit`: an `Outcome` that it returns, or `Diverged`, which it raises."""

from dataclasses import dataclass
from signal import Signals


class Diverged(RuntimeError):
    """The loss or a weight is no longer a finite number."""


@dataclass(frozen=True)
class Outcome:
    """A run that was saved.

    Attributes:
        finished: all epochs are done, or `Watch.ended`; else the run can be resumed.
        signal: what stopped it; None for --stop-after.
        early: why it finished before its last epoch (`Watch.ended`); None where it did not.
    """

    finished: bool
    signal: Signals | None = None
    early: str | None = None
