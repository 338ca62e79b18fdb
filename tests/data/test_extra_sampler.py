"""Batches of original and extra images: the published sampler's statistics, loaders, ranks and restarts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from support.extra_images import extra_arrays, packed_npz
from support.loaders import DALI, PAD, make, random_set
from torch import Tensor

from fastdynat.data import Batch, ImageSet
from fastdynat.data.extra_sampler import ExtendedImages, ExtraSampler
from fastdynat.data.extra_store import ExtraSet
from fastdynat.data.keyed_permutation import DRAWN, permuted
from fastdynat.errors import UserError
from fastdynat.ops.augment import crop, flip, to_unit

OWN, EXTRA, BATCH = 50, 37, 16
LOADERS = ["resident", "torch", "torch-0", pytest.param("dali", marks=DALI)]


def extended(folder: Path, *, share: float = 0.7, replacement: bool = True) -> ExtendedImages:
    store = packed_npz(folder, EXTRA)
    assert store.labels is not None
    extra = ExtraSet(store, store.labels, (3, 8, 8))
    return ExtendedImages(random_set(OWN, (3, 8, 8)), extra, share, replacement)


def sampler(
    own: int = 1000,
    extra: int = 300,
    batch: int = 64,
    share: float = 0.7,
    *,
    replacement: bool = True,
    seed: int = 3,
    steps: int | None = None,
) -> ExtraSampler:
    return ExtraSampler(own, extra, batch, share, replacement, seed, steps)


def published_sampler(own: int, extra: int, batch: int, share: float, steps: int) -> list[list[int]]:
    """One epoch of SemiSupervisedSampler as Gowal et al. 2021 and Wang et al. 2023 describe and release it:
    a truncated number of extra images, shuffled passes over the originals, extra images by randint.
    """
    of_extra = int(batch * share)
    of_own = batch - of_extra
    batches: list[list[int]] = []
    while len(batches) < steps:
        order = torch.randperm(own).tolist()
        for start in range(0, own, of_own):
            if len(batches) == steps:
                break
            now = order[start : start + of_own]
            now += (own + torch.randint(extra, (batch - len(now),))).tolist()
            batches.append(now)
    return batches


@pytest.mark.parametrize(
    ("own", "batch", "share"),
    [(1000, 64, 0.7), (1000, 512, 0.8), (1000, 90, 0.7), (100, 64, 0.1), (50, 96, 0.7)],
)
def test_batches_have_as_many_extra_images_as_the_published_sampler(
    own: int, batch: int, share: float
) -> None:
    steps = -(-own // batch)
    for given in (None, 3 * steps + 1):
        made = sampler(own, 500, batch, share, steps=given)
        assert made.num_steps == (given or steps)
        rows = made.order(0).view(made.num_steps, batch)
        expected = published_sampler(own, 500, batch, share, made.num_steps)
        assert (rows >= own).sum(1).tolist() == [sum(i >= own for i in now) for now in expected]


def test_published_sizes() -> None:
    wang = sampler(50_000, 1_000_000, 512, 0.7)
    assert (wang.own_per_step, wang.extra_per_step, wang.num_steps) == (154, 358, 98)


def test_each_original_comes_once_in_a_pass() -> None:
    made = sampler(steps=120)  # 50 steps are a pass: 20 originals in each
    rows = made.order(2).view(120, 64)
    for start in (0, 50):
        own = rows[start : start + 50]
        assert sorted(own[own < 1000].tolist()) == list(range(1000))
    tail = rows[100:]
    assert len(tail[tail < 1000].unique()) == (tail < 1000).sum()


def counts_of_extra(made: ExtraSampler, epochs: int) -> Tensor:
    numbers = torch.cat([made.order(epoch) for epoch in range(epochs)])
    return torch.bincount(numbers[numbers >= made.originals] - made.originals, minlength=made.extra)


def test_extra_images_with_replacement_are_uniform_and_independent() -> None:
    counts = counts_of_extra(sampler(), 40)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    # Independent draws repeat within a pass: their counts spread as Poisson's do.
    assert 0.75 < counts.double().var() / counts.double().mean() < 1.3


@pytest.mark.parametrize("extra", [300, 45, 5000])
def test_without_replacement_every_extra_image_comes_once_before_any_repeats(extra: int) -> None:
    made = sampler(extra=extra, replacement=False)
    drawn = []
    for epoch in range(12):
        rows = made.order(epoch).view(made.num_steps, made.batch_size)
        # Inside a step the order is shuffled: the sets of whole steps tell the permutation's.
        drawn += [sorted((row[row >= 1000] - 1000).tolist()) for row in rows]
    assert counts_of_extra(made, 12).max() - counts_of_extra(made, 12).min() <= 1
    flat = [number for row in drawn for number in row]
    steps_of_pass = extra // made.extra_per_step
    assert len({n for row in drawn[:steps_of_pass] for n in row}) == steps_of_pass * made.extra_per_step
    assert len(flat) == 12 * made.num_steps * made.extra_per_step


def test_passes_without_replacement_are_in_other_orders() -> None:
    first, second = (permuted(torch.arange(100), 100, "extra pass", 3, number) for number in (0, 1))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(100))
    assert (first == second).sum() < 15


@pytest.mark.parametrize("count", [DRAWN + 1, 2**21, 3_000_017])
def test_keyed_permutations_are_permutations_whose_places_are_independent(count: int) -> None:
    whole = permuted(torch.arange(count), count, "a", 1)
    assert torch.equal(whole.sort().values, torch.arange(count))
    places = torch.tensor([0, 5, count - 1, 17])
    assert torch.equal(permuted(places, count, "a", 1), whole[places])
    other = permuted(torch.arange(count), count, "a", 2)
    assert (whole == other).sum() < 12  # one place in expectation
    # The images of a step are spread evenly, and neighbours are unrelated.
    cells = torch.bincount(whole[: 64 * 500] * 64 // count, minlength=64)
    assert stats.chisquare(cells.numpy()).pvalue > 1e-3
    pairs = np.corrcoef(whole[:-1].numpy(), whole[1:].numpy())[0, 1]
    assert abs(pairs) < 5 / count**0.5


def test_fifty_million_images_are_numbered_and_need_no_permutation_in_memory() -> None:
    made = sampler(50_000, 50_000_000, 1024, 0.8, replacement=False)
    epoch = made.order(5)
    assert epoch.dtype == torch.int64
    assert len(epoch) == 49 * 1024
    extra = epoch[epoch >= 50_000]
    assert len(extra.unique()) == len(extra) == 49 * 819
    assert int(extra.max()) < 50_050_000 < 2**32 - 1
    assert stats.kstest(extra.double().numpy(), stats.uniform(50_000, 50_000_000).cdf).pvalue > 1e-3


def test_inside_a_batch_the_images_are_shuffled() -> None:
    rows = sampler(steps=400).order(0).view(400, 64) >= 1000
    # Every position is an extra image in 44 of 64 batches: 275 of 400, deviation 9.3.
    assert (rows.sum(0) - 275).abs().max() < 42
    shares = torch.stack([rows[:, rank::4].sum(1) for rank in range(4)])
    assert shares.min() > 2
    assert shares.max() < 17


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    made = sampler()
    assert torch.equal(made.order(4), sampler().order(4))
    assert not torch.equal(made.order(4), made.order(5))
    assert not torch.equal(made.order(4), sampler(seed=4).order(4))


def reference(images: ExtendedImages, batch: Batch, positions: list[int], plan: object) -> Tensor:
    """`batch.x` made from the published arrays, one image after the other."""
    published, _ = extra_arrays(EXTRA)
    assert isinstance(images.originals, ImageSet)
    made = []
    for position, number in zip(positions, batch.indices.tolist(), strict=True):
        one = (
            images.originals.images[number]
            if number < OWN
            else torch.from_numpy(published[number - OWN]).permute(2, 0, 1)
        )
        one = crop(one[None], plan.shifts[:, [position]], PAD)  # type: ignore[attr-defined]
        made.append(flip(one, plan.flips[[position]]))  # type: ignore[attr-defined]
    return to_unit(torch.cat(made), channels_last=False)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("replacement", [True, False])
def test_every_loader_gives_the_published_pixels_and_labels(
    loader: str, replacement: bool, tmp_path: Path
) -> None:
    images = extended(tmp_path, replacement=replacement)
    made = make(loader, images, batch_size=BATCH)
    _, labels = extra_arrays(EXTRA)
    all_labels = torch.cat([images.originals.labels, torch.from_numpy(labels)])
    assert (made.num_images, made.steps_per_epoch) == (OWN, 4)
    for epoch in (0, 2):
        plan = made._plan(epoch)  # type: ignore[attr-defined]
        for step, batch in enumerate(made.epoch(epoch)):
            positions = list(range(step * BATCH, (step + 1) * BATCH))
            assert torch.equal(batch.indices, plan.order[positions])
            assert torch.equal(batch.labels, all_labels[batch.indices])
            assert torch.equal(batch.x, reference(images, batch, positions, plan))


@pytest.mark.parametrize("loader", ["resident", "torch-0"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_ranks_together_take_the_batches_of_one_process(loader: str, ranks: int, tmp_path: Path) -> None:
    images = extended(tmp_path, replacement=False)
    whole = list(make(loader, images, batch_size=BATCH).epoch(1))
    parts = [
        list(make(loader, images, batch_size=BATCH, ranks=ranks, rank=rank).epoch(1)) for rank in range(ranks)
    ]
    for step, batch in enumerate(whole):
        for rank in range(ranks):
            own = parts[rank][step]
            for name in ("x", "labels", "indices"):
                assert torch.equal(getattr(own, name), getattr(batch, name)[rank::ranks])


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("replacement", [True, False])
def test_an_epoch_resumes_in_the_middle(loader: str, replacement: bool, tmp_path: Path) -> None:
    images = extended(tmp_path, replacement=replacement)
    first = make(loader, images, batch_size=BATCH, epoch_steps=7)
    whole = list(first.epoch(3))
    state = first.state_dict()
    again = make(loader, images, batch_size=BATCH, epoch_steps=7)
    again.load_state_dict(state)
    rest = list(again.epoch(state["epoch"], 4))
    assert len(whole) == 7
    assert len(rest) == 3
    for a, b in zip(rest, whole[4:], strict=True):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("change", ["share", "replacement", "none", "labels"])
def test_a_state_of_other_extra_images_is_refused(change: str, tmp_path: Path) -> None:
    images = extended(tmp_path)
    state = make("resident", images, batch_size=BATCH).state_dict()
    others = {
        "share": ExtendedImages(images.originals, images.extra, 0.5, True),
        "replacement": ExtendedImages(images.originals, images.extra, 0.7, False),
        "none": images.originals,
        "labels": ExtendedImages(
            images.originals,
            ExtraSet(images.extra.store, 9 - images.extra.labels, images.extra.shape),
            0.7,
            True,
        ),
    }
    other = make("resident", others[change], batch_size=BATCH)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"other extra data|images per epoch"):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.01}, "is less than one image"),
        ({"own": 10, "batch": 64, "share": 0.5}, "takes 32 of the 10 training images"),
        ({"extra": 43, "replacement": False}, "takes 44 extra images for a batch of 64, but there are 43"),
        ({"extra": 43}, "takes 44 extra images for a batch of 64, but there are 43"),
        ({"extra": 2**32}, "more than the 4,294,967,295"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sampler(**options)
