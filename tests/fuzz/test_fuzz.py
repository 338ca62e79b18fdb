"""No input ends in a traceback, a hang, executed code or a run that a refusal changed."""

import os
from pathlib import Path

import pytest

from fuzz.base import make_base
from fuzz.cases import SHARES, STRATEGIES
from fuzz.harness import Tally, attempt, digests, sandbox
from fuzz.known import KNOWN, known_case
from fuzz.search import search

DEFAULT, SLOW = 300, int(os.environ.get("FASTDYNAT_FUZZ_EXAMPLES", "10000"))  # inputs of all kinds together


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("kind", STRATEGIES)
@pytest.mark.parametrize(
    "number", [DEFAULT, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["default", "slow"]
)
def test_inputs(kind: str, number: int, base: Path) -> None:
    before, tally = digests(base), Tally()
    number = -(-number * SHARES[kind] // 100)
    search(kind, base, number, tally)
    assert sum(tally.codes.values()) + len(tally.failures) >= number // 2
    assert not tally.failures, tally.table()
    assert digests(base) == before


@pytest.mark.parametrize("name", KNOWN)
def test_known_inputs(name: str, base: Path) -> None:
    before, tally = digests(base), Tally()
    with sandbox():
        attempt(known_case(name), base, tally)
    assert not tally.failures, tally.table()
    assert tally.codes["known", KNOWN[name][2]] == 1, tally.table()
    assert digests(base) == before
