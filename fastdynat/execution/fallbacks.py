"""Fallbacks: speed-ups that were asked for and are not used, with the reasons."""

import logging
import warnings

logger = logging.getLogger(__name__)


class Fallbacks:
    """Collects the fallbacks of one engine, step or compiled function; each is logged as a warning.

    Attributes:
        texts: one sentence per fallback, oldest first.
    """

    def __init__(self) -> None:
        self.texts: list[str] = []

    def add(self, text: str) -> None:
        """Record a fallback and report it, each text once."""
        if text not in self.texts:
            self.texts.append(text)
            self.report(text)

    def report(self, text: str) -> None:
        """Tell the user; subclasses choose another way than the log."""
        logger.warning(text)


class WarnedFallbacks(Fallbacks):
    """Fallbacks as Python warnings, for callers who build an engine themselves."""

    def report(self, text: str) -> None:
        warnings.warn(text, stacklevel=3)


class SilentFallbacks(Fallbacks):
    """Fallbacks that are only collected, for trials whose outcome is reported otherwise."""

    def report(self, text: str) -> None:
        """Report nothing."""
