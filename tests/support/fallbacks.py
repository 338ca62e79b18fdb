"""Fallbacks for tests: refused, or collected in a list of the test's."""

import pytest

from fastdynat.execution.fallbacks import Fallbacks


class NoFallbacks(Fallbacks):
    """Fails the test at the first fallback."""

    def report(self, text: str) -> None:
        pytest.fail(text)


class CollectedIn(Fallbacks):
    """Collects fallbacks in `texts` and reports nothing."""

    def __init__(self, texts: list[str]) -> None:
        super().__init__()
        self.texts = texts

    def report(self, text: str) -> None:
        """Report nothing."""
