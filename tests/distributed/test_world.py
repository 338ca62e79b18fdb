"""The processes of a program, their sums, and how batches are dealt out to them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdynat.distributed import ALONE, batch_world, replicated_batch, world
from fastdynat.distributed.flat import flat_sum
from fastdynat.distributed.shares import deal


def _sums() -> tuple[float, float, list[int], str, int]:
    here = world()
    total = float(here.sum_(torch.tensor(float(here.rank + 1))))
    gathered = here.gather(here.rank)
    return total, here.maximum(here.rank), gathered, here.from_first(f"of {here.rank}"), here.size


def test_a_world_of_two_sums_gathers_and_broadcasts(ranks) -> None:
    assert ranks(2)(_sums) == [(3.0, 1.0, [0, 1], "of 0", 2)] * 2


def test_without_a_launcher_there_is_one_process() -> None:
    assert world() is ALONE
    assert _sums() == (1.0, 0.0, [0], "of 0", 1)


def _flat() -> list[torch.Tensor]:
    rank = world().rank
    tensors = [torch.full((2, 3), 1.0 + rank), torch.full((4,), 10.0 + rank, dtype=torch.float64)]
    tensors.append(torch.arange(16.0).view(1, 4, 2, 2).to(memory_format=torch.channels_last) * rank)
    flat_sum(tensors, world(), scale=0.5)
    return tensors


def test_a_flat_sum_covers_dtypes_and_memory_formats(ranks) -> None:
    for tensors in ranks(2)(_flat):
        assert torch.equal(tensors[0], torch.full((2, 3), 1.5))
        assert torch.equal(tensors[1], torch.full((4,), 10.5, dtype=torch.float64))
        assert torch.equal(tensors[2], torch.arange(16.0).view(1, 4, 2, 2) / 2)


def _replicated() -> tuple[int, int]:
    with replicated_batch():
        return batch_world().size, world().size


def test_a_replicated_batch_is_each_rank_s_own(ranks) -> None:
    assert ranks(2)(_replicated) == [(1, 2)] * 2


@given(total=st.integers(1, 200), ranks=st.integers(1, 9), parts=st.integers(1, 4))
def test_shares_partition_a_batch_and_weigh_one(total: int, ranks: int, parts: int) -> None:
    shares = [deal(total, rank, ranks, parts) for rank in range(ranks)]
    assert sum(share.weight for share in shares) == pytest.approx(1)
    cut = [share.pieces(parts) for share in shares]
    # The micro-batches of all ranks together are those of one process.
    alone = [[*piece.positions] for piece in deal(total, 0, 1).pieces(parts)]
    if shares[0].replicated:
        assert total < 2 * ranks * parts
        assert all([[*piece.positions] for piece in pieces] == alone for pieces in cut)
        return
    assert [sorted(p for piece in same for p in piece.positions) for same in zip(*cut, strict=True)] == alone
    pieces = [piece for one in cut for piece in one]
    assert ranks * len(alone) == 1 or min(piece.images for piece in pieces) >= 2
    assert [piece.images_of_all_ranks for piece in cut[0]] == [len(positions) for positions in alone]
    for position in (0, total // 3, total):
        assert sum(piece.below(position) for piece in pieces) == position
