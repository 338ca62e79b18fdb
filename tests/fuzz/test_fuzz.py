"""No input ends in a traceback, a hang, executed code or a run that a refusal changed."""

import os
from pathlib import Path

import pytest

from fuzz.base import make_base
from fuzz.cases import STRATEGIES
from fuzz.harness import Tally, digests
from fuzz.search import search

NUMBER = 300 // len(STRATEGIES) + 1
SLOW_NUMBER = int(os.environ.get("FASTDYNAT_FUZZ_EXAMPLES", "10000")) // len(STRATEGIES) + 1


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("kind", STRATEGIES)
@pytest.mark.parametrize("number", [NUMBER, pytest.param(SLOW_NUMBER, marks=pytest.mark.slow)], ids=["default", "slow"])
def test_inputs(kind: str, number: int, base: Path) -> None:
    before, tally = digests(base), Tally()
    search(kind, base, number, tally)
    assert sum(tally.codes.values()) + len(tally.failures) >= number // 2
    assert not tally.failures, tally.table()
    assert digests(base) == before
