"""Per-image outcomes: bits, intervals, accuracies per class."""

from math import comb

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdynat.evaluation.outcome import Measurement, pack_bits, unpack_bits, wilson


@given(st.lists(st.booleans(), max_size=70))
def test_bits_come_back(bits: list[bool]) -> None:
    mask = torch.tensor(bits, dtype=torch.bool)
    packed = pack_bits(mask)
    assert len(packed) <= 2 * (len(bits) // 8 + 1)
    assert torch.equal(unpack_bits(packed, len(bits)), mask)


@given(st.integers(1, 400), st.data())
def test_interval_holds_the_share_and_stays_in_the_range(total: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, total))
    low, high = wilson(correct, total)
    assert 0 <= low <= correct / total <= high <= 1
    assert low < high
    assert wilson(total - correct, total) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5])
def test_interval_covers_about_95_percent(share: float) -> None:
    total = 200
    chances = [comb(total, k) * share**k * (1 - share) ** (total - k) for k in range(total + 1)]
    covered = sum(p for k, p in enumerate(chances) if wilson(k, total)[0] <= share <= wilson(k, total)[1])
    assert 0.93 < covered < 0.975


def test_a_measurement_counts_by_class_and_distance() -> None:
    robust, labels = torch.tensor([True, False, True, True]), torch.tensor([0, 0, 1, 3])
    got = Measurement.of(
        "x",
        robust,
        labels,
        classes=4,
        seconds=2.0,
        batch_size=4,
        distances=torch.tensor([0.5, 0.0, float("inf"), 1.0]),
    )
    assert (got.correct, got.accuracy, got.images_per_s) == (3, 0.75, 2.0)
    assert got.per_class == [0.5, 1.0, None, 1.0]
    assert got.distances == [0.5, 0.0, None, 1.0]
