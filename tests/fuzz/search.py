"""Inputs of one kind, the same ones each time: hypothesis draws them, and none stops the others."""

from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings

from fuzz.cases import STRATEGIES
from fuzz.harness import Case, Tally, attempt, sandbox


def search(kind: str, base: Path, number: int, tally: Tally) -> None:
    """Try `number` inputs of `kind` on copies of `base`; `tally` takes what comes of them."""

    @settings(
        max_examples=number,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(STRATEGIES[kind](base))
    def tried(case: Case) -> None:
        attempt(case, base, tally)

    with sandbox():
        tried()
