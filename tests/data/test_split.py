"""Held-out splits: disjoint, stratified, deterministic, and never leaving a class empty."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdynat.data.split import seeded_generator, stratified_split
from fastdynat.errors import UserError

COUNTS = st.lists(st.integers(1, 30), min_size=1, max_size=8)


def labels_of(counts: list[int]) -> torch.Tensor:
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]


@settings(max_examples=100, deadline=None)
@given(COUNTS, st.data())
def test_split_is_disjoint_complete_and_leaves_every_class(counts, data):
    labels = labels_of(counts)
    val_size = data.draw(st.integers(0, len(labels) - len(counts)))
    train, val = stratified_split(labels, val_size=val_size, limit=None, seed=0)
    assert len(val) == val_size
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(len(labels)))
    assert set(labels[train].tolist()) == set(range(len(counts)))
    assert torch.equal(train, train.sort().values)
    assert torch.equal(val, val.sort().values)


@settings(max_examples=60, deadline=None)
@given(COUNTS, st.data())
def test_limit_keeps_a_subset_with_every_class(counts, data):
    labels = labels_of(counts)
    val_size = data.draw(st.integers(0, len(labels) - len(counts)))
    limit = data.draw(st.integers(len(counts), len(labels) + 5))
    full, val = stratified_split(labels, val_size=val_size, limit=None, seed=3)
    train, same_val = stratified_split(labels, val_size=val_size, limit=limit, seed=3)
    assert torch.equal(val, same_val)
    assert len(train) == min(limit, len(full))
    assert set(train.tolist()) <= set(full.tolist())
    assert set(labels[train].tolist()) == set(range(len(counts)))


def test_shares_follow_the_classes():
    labels = labels_of([1000, 500, 100])
    train, val = stratified_split(labels, val_size=160, limit=720, seed=0)
    assert torch.bincount(labels[val]).tolist() == [100, 50, 10]
    assert torch.bincount(labels[train]).tolist() == [450, 225, 45]


def test_share_and_number_agree():
    labels = labels_of([50, 50])
    by_share = stratified_split(labels, val_size=0.2, limit=None, seed=0)
    by_number = stratified_split(labels, val_size=20, limit=None, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(by_share, by_number, strict=True))


def test_a_share_of_less_than_an_image_is_refused():
    labels = labels_of([800, 637])
    with pytest.raises(
        UserError, match=r"val_size 0\.0003 holds none of 1437 training images out; give --val-size 1"
    ):
        stratified_split(labels, val_size=0.0003, limit=None, seed=0)
    for nothing in (0, 0.0):
        assert not len(stratified_split(labels, val_size=nothing, limit=None, seed=0)[1])
    assert len(stratified_split(labels, val_size=0.001, limit=None, seed=0)[1]) == 1


@pytest.mark.parametrize(
    ("counts", "message", "remedies"),
    [
        (
            [2, 2],
            r"\(10 %\) holds none of 4 training images out; give --val-size 1 or more images, or 0 ",
            (0, 1),
        ),
        (
            [3, 2],
            r"\(10 %\) holds none of 5 training images out; give --val-size 1 or more images, or 0 ",
            (0, 1),
        ),
        ([1] * 4, r"\(10 %\) holds none of 4 training images out; give --val-size 0 to train without", (0,)),
        ([1] * 12, r"\(10 %\) holds out 1 of 12 .* give --val-size 0 at most", (0,)),
        ([2] * 500 + [1] * 9500, r"\(1,000 images\) holds out 1000 of .* --val-size 500 at most", (0, 500)),
    ],
)
def test_a_default_that_cannot_be_is_named_as_the_default(counts, message, remedies):
    labels = labels_of(counts)
    with pytest.raises(UserError, match="^the default of val_size " + message):
        stratified_split(labels, val_size=None, limit=None, seed=0)
    for remedy in remedies:
        assert len(stratified_split(labels, val_size=remedy, limit=None, seed=0)[1]) == remedy


def test_deterministic_in_the_seed_only():
    labels = labels_of([200, 200])
    state = torch.get_rng_state()
    first = stratified_split(labels, val_size=100, limit=None, seed=1)[1]
    torch.rand(5)
    torch.set_rng_state(state)
    assert torch.equal(stratified_split(labels, val_size=100, limit=None, seed=1)[1], first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(stratified_split(labels, val_size=100, limit=None, seed=2)[1], first)


def test_no_validation_images():
    for nothing in (0, 0.0):
        train, val = stratified_split(labels_of([3, 4]), val_size=nothing, limit=None, seed=0)
        assert len(train) == 7
        assert len(val) == 0
        assert val.dtype == torch.int64


@pytest.mark.parametrize(
    ("val_size", "limit", "message"),
    [
        (
            9,
            None,
            "val_size 9 holds out 9 of 10 training images, but each of the 2 classes must keep one; give "
            "--val-size 8 at most",
        ),
        (0.95, None, "val_size 0.95 holds out 10 of 10"),
        (-1, None, "val_size -1 must not be negative"),
        (1.5, None, r"val_size 1.5 must be a share in \(0, 1\)"),
        (float("nan"), None, "val_size nan must be a share"),
        (0, 1, "limit 1 leaves some of the 2 classes without a training image"),
    ],
)
def test_impossible_sizes(val_size, limit, message):
    with pytest.raises(UserError, match=message):
        stratified_split(labels_of([5, 5]), val_size=val_size, limit=limit, seed=0)


def test_generator_streams_do_not_collide():
    # 2**32 apart would be the same stream if the seed went to PyTorch as it is.
    keys = [(0, 0), (0, 1), (1, 0), (2**32, 0), (0, 2**32), ("0", 0)]
    draws = {torch.randint(2**60, (1,), generator=seeded_generator(*key)).item() for key in keys}
    assert len(draws) == len(keys)
