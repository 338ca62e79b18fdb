"""Loaders: every image once per epoch, crops and flips bit-equal to a per-image reference, exact restarts."""

import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdynat.data import Batch, ImageSet, ResidentLoader, TrainLoader, check_image_set, eval_batches
from fastdynat.data.epoch_plan import plan_epoch
from fastdynat.errors import UserError


def random_set(num_images: int, shape=(3, 8, 8), seed: int = 0) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (num_images, *shape), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.randint(10, (num_images,), generator=generator))


def make(data: ImageSet, **kwargs) -> ResidentLoader:
    return ResidentLoader(
        data, **{"batch_size": 16, "augment": "crop-flip", "seed": 0, "device": "cpu", **kwargs}
    )


def assert_same(got: list[Batch], expected: list[Batch]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.indices, b.indices)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.booleans(), st.integers(0, 2**40), st.integers(0, 500))
def test_epoch_visits_images_once(num_images, batch_size, drop_last, seed, epoch):
    batch_size = min(batch_size, num_images)
    loader = make(random_set(num_images), batch_size=batch_size, drop_last=drop_last, seed=seed)
    batches = list(loader.epoch(epoch))
    seen = torch.cat([batch.indices for batch in batches])
    rest = num_images % batch_size
    left_out = rest if drop_last or rest == 1 else 0
    assert len(batches) == loader.steps_per_epoch
    assert len(seen) == num_images - left_out
    assert len(seen.unique()) == len(seen)
    assert batch_size == 1 or all(len(batch.labels) > 1 for batch in batches)


def test_the_single_image_left_out_changes_with_the_epoch():
    loader = make(random_set(33))
    assert loader.steps_per_epoch == 2
    left_out = {
        (set(range(33)) - set(torch.cat([b.indices for b in loader.epoch(e)]).tolist())).pop()
        for e in range(8)
    }
    assert len(left_out) > 1


@pytest.mark.parametrize("augment", ["none", "flip", "crop", "crop-flip"])
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 7, 9)])
def test_augmentation_equals_per_image_reference(augment, shape):
    data, pad = random_set(50, shape), 3
    loader = make(data, augment=augment, pad=pad, seed=5)
    plan = plan_epoch(50, pad=pad, seed=5, epoch=2)
    batches = list(loader.epoch(2))
    x, indices = torch.cat([b.x for b in batches]), torch.cat([b.indices for b in batches])
    assert torch.equal(indices, plan.order)
    for position, index in enumerate(indices.tolist()):
        image = data.images[index]
        if "crop" in augment:
            top, left = plan.shifts[:, position].tolist()
            image = F.pad(image, (pad, pad, pad, pad))[:, top : top + shape[1], left : left + shape[2]]
        if "flip" in augment and plan.flips[position]:
            image = image.flip(2)
        assert torch.equal(x[position], image.float() / 255)


def test_draws_are_uniform():
    plan = plan_epoch(40_000, pad=4, seed=1, epoch=0)
    counts = torch.bincount(plan.shifts[0] * 9 + plan.shifts[1], minlength=81)
    # 494 expected in each of the 81 cells; 5 standard deviations.
    assert len(counts) == 81
    assert (counts - 40_000 / 81).abs().max() < 5 * (40_000 / 81) ** 0.5
    assert plan.flips.float().mean().item() == pytest.approx(0.5, abs=0.0125)


def test_every_epoch_and_seed_is_a_fresh_draw():
    plans = [plan_epoch(500, pad=4, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    for i, a in enumerate(plans):
        for b in plans[:i]:
            assert (a.order == b.order).float().mean() < 0.05
            assert (a.shifts[0] == b.shifts[0]).float().mean() < 0.2
            assert 0.35 < (a.flips == b.flips).float().mean() < 0.65


def test_plan_is_pinned():
    # A release that changed these numbers could not resume the checkpoints of the one before.
    plan = plan_epoch(8, pad=4, seed=3, epoch=7)
    assert plan.order.tolist() == [6, 0, 2, 4, 3, 7, 1, 5]
    assert plan.shifts[0].tolist() == [1, 7, 6, 5, 6, 8, 4, 4]


def test_order_does_not_depend_on_augmentation():
    data = random_set(50)
    first = [
        torch.cat([b.indices for b in make(data, augment=a, pad=p).epoch(0)])
        for a, p in [("none", 4), ("crop", 2)]
    ]
    assert torch.equal(*first)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 60), st.integers(1, 20), st.integers(0, 30), st.data())
def test_tail_equality(num_images, batch_size, epoch, data):
    loader = make(random_set(num_images), batch_size=min(batch_size, num_images))
    start = data.draw(st.integers(0, loader.steps_per_epoch))
    whole = list(loader.epoch(epoch))
    torch.rand(3)  # the global random state must not matter
    assert_same(list(loader.epoch(epoch, start_step=start)), whole[start:])


def test_global_random_state_is_untouched():
    state = torch.get_rng_state()
    list(make(random_set(40)).epoch(0))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("augment", ["none", "crop-flip"])
def test_channels_last_has_the_same_values(augment):
    data = random_set(40)
    plain, last = (list(make(data, augment=augment, channels_last=c).epoch(0)) for c in (False, True))
    assert_same(last, plain)
    assert all(batch.x.is_contiguous(memory_format=torch.channels_last) for batch in last)
    assert all(batch.x.is_contiguous() for batch in plain)


def test_types_and_range():
    loader: TrainLoader = make(random_set(40))
    for batch in loader.epoch(0):
        assert (batch.x.dtype, batch.labels.dtype, batch.indices.dtype) == (
            torch.float32,
            torch.int64,
            torch.int64,
        )
        assert batch.x.min() >= 0
        assert batch.x.max() <= 1


def test_state_goes_through_weights_only():
    data = random_set(40)
    loader = make(data, seed=9)
    list(loader.epoch(4))
    buffer = io.BytesIO()
    torch.save(loader.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert state["epoch"] == 4
    assert sorted(state["permutation"].tolist()) == list(range(40))
    fresh = make(data, seed=9)
    fresh.load_state_dict(state)
    assert fresh.state_dict()["epoch"] == 4
    assert torch.equal(fresh.state_dict()["permutation"], state["permutation"])


@pytest.mark.parametrize(
    ("data", "kwargs", "message"),
    [
        (random_set(41), {}, "training images 40, this run has 41"),
        (random_set(40, seed=1), {}, "other training data; resume with the same --data"),
        (random_set(40), {"batch_size": 8}, "batch size 16, this run has 8"),
        (random_set(40), {"seed": 1}, "data seed 0, this run has 1"),
    ],
)
def test_state_of_another_run_is_refused(data, kwargs, message):
    state = make(random_set(40)).state_dict()
    with pytest.raises(UserError, match=message):
        make(data, **kwargs).load_state_dict(state)


def test_state_with_another_order_is_refused():
    loader = make(random_set(40))
    state = loader.state_dict()
    state["permutation"] = state["permutation"].flip(0)
    with pytest.raises(UserError, match="order of epoch 0 is not what seed 0 gives"):
        loader.load_state_dict(state)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 41}, "batch size 41 must be between 1 and the number of training images, 40"),
        ({"batch_size": 0}, "batch size 0 must be between 1 and"),
        ({"augment": "crop_flip"}, "unknown augmentation 'crop_flip': did you mean 'crop-flip'"),
        ({"pad": -1}, "pad must be 0 or more pixels, got -1"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(UserError, match=message):
        make(random_set(40), **kwargs)


@pytest.mark.parametrize("start", [-1, 4])
def test_start_step_outside_the_epoch(start):
    with pytest.raises(UserError, match=rf"start_step {start} is outside \[0, 3\]"):
        make(random_set(40)).epoch(0, start_step=start)


@pytest.mark.parametrize(("limit", "expected"), [(None, 23), (10, 10), (99, 23)])
def test_eval_batches_in_order(limit, expected):
    data = random_set(23)
    batches = list(eval_batches(data, batch_size=5, device="cpu", limit=limit, channels_last=True))
    assert torch.equal(torch.cat([b.x for b in batches]), data.images[:expected].float() / 255)
    assert torch.equal(torch.cat([b.labels for b in batches]), data.labels[:expected])
    assert torch.equal(torch.cat([b.indices for b in batches]), torch.arange(expected))


@pytest.mark.parametrize("kwargs", [{"batch_size": 0}, {"batch_size": 5, "limit": 0}])
def test_eval_batches_refuses_zero(kwargs):
    with pytest.raises(UserError, match="batch size and limit must be at least 1"):
        eval_batches(random_set(3), device="cpu", **kwargs)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            torch.zeros(3, 1, 4, 4),
            torch.zeros(3).long(),
            r"toy: images must be uint8 .*got float32 \(3, 1, 4, 4\)",
        ),
        (torch.zeros(3, 4, 4).byte(), torch.zeros(3).long(), r"got uint8 \(3, 4, 4\)"),
        (
            torch.zeros(3, 1, 4, 4).byte(),
            torch.zeros(2).long(),
            r"labels must be int64 of shape \(3,\).*got int64 \(2,\)",
        ),
        (torch.zeros(3, 1, 4, 4).byte(), torch.zeros(3), r"got float32 \(3,\)"),
        (
            torch.zeros(3, 1, 4, 4).byte(),
            torch.tensor([0, 10, -1]),
            r"label 10 at index 1 is outside \[0, 10\)",
        ),
        (
            torch.zeros(3, 1, 4, 4).byte(),
            torch.tensor([0, -1, 10]),
            r"label -1 at index 1 is outside \[0, 10\)",
        ),
    ],
)
def test_check_labels(images, labels, message):
    with pytest.raises(UserError, match=message):
        check_image_set(ImageSet(images, labels), 10, "toy")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_batches_of_the_cpu():
    data = random_set(50)
    for channels_last in (False, True):
        cpu, cuda = (
            list(make(data, device=d, channels_last=channels_last).epoch(1)) for d in ("cpu", "cuda")
        )
        assert_same([Batch(b.x.cpu(), b.labels.cpu(), b.indices.cpu()) for b in cuda], cpu)
