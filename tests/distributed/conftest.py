"""Worlds of two and four gloo processes, shared by the tests of this folder."""

from collections.abc import Callable, Iterator

import pytest
from support.ranks import RankPool


@pytest.fixture(scope="session")
def _pools() -> Iterator[dict[int, RankPool]]:
    pools: dict[int, RankPool] = {}
    yield pools
    for pool in pools.values():
        pool.close()


def _pool(pools: dict[int, RankPool], size: int) -> RankPool:
    if size not in pools or pools[size].closed:
        pools[size] = RankPool(size)
    return pools[size]


@pytest.fixture
def ranks(_pools: dict[int, RankPool]) -> Callable[[int], RankPool]:
    """``ranks(W)``: a world of W processes."""
    return lambda size: _pool(_pools, size)
