"""Every augmentation in every loader: one result, restarts, any number of ranks, and unchanged plans."""

from pathlib import Path

import pytest
import torch
from conftest import needs
from support.extra_images import packed_npz
from support.loaders import LOADERS, make, random_set

from fastdynat import ops
from fastdynat.config import AugmentationConfig
from fastdynat.data import Batch, DatasetInfo, ImageSet
from fastdynat.data.augmentation import stages_of
from fastdynat.data.augmentation.resized_crop import ResizedCrop
from fastdynat.data.epoch_plan import plan_epoch
from fastdynat.data.extra_sampler import ExtendedImages
from fastdynat.data.extra_store import ExtraSet
from fastdynat.data.mixing import Mixing

SHAPE = (3, 10, 12)
INFO = DatasetInfo("noise", 10, SHAPE, tuple("0123456789"), (0.5, 0.4, 0.3), (0.25, 0.2, 0.3), "crop-flip")
STAGES = {
    "cutout": {"cutout": 5},
    "erasing": {"reprob": 0.6},
    "resized": {"scale": (0.3, 0.9)},
    "black": {"reprob": 0.6, "remode": "const"},
    "jitter": {"color_jitter": 0.4},
    "randaugment": {"aa": "randaugment:2:14"},
    "trivialaugment": {"aa": "trivialaugment"},
    "autoaugment": {"aa": "autoaugment:cifar10"},
    "timm": {"aa": "rand-m9-mstd0.5-inc1"},
    "idbh": {"aa": "idbh-weak"},
}
MIXING = {
    "mixup": {"mixup": 0.8},
    "cutmix": {"cutmix": 1.0},
    "both": {"mixup": 0.8, "cutmix": 1.0, "mixup_prob": 0.8},
    "groups": {"cutmix": 1.0, "mixup_groups": 4},
    "everything": {"aa": "randaugment", "reprob": 0.3, "cutout": 4, "mixup": 0.5, "cutmix": 1.0},
}
ALL = STAGES | MIXING


def options(name: str) -> dict[str, object]:
    config = AugmentationConfig(**ALL[name])  # type: ignore[arg-type]
    return {
        "stages": stages_of(config, INFO),
        "mixing": Mixing.of(config, INFO.num_classes),
        "resized_crop": ResizedCrop.of(config),
    }


def images(count: int = 43) -> ImageSet:
    return random_set(count, SHAPE)


def assert_same(got: list[Batch], expected: list[Batch]) -> None:
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        for name in ("x", "labels", "indices", "targets"):
            assert torch.equal(getattr(a, name), getattr(b, name))


def in_order(batches: list[Batch]) -> torch.Tensor:
    """The images of all batches by their number in the set."""
    return torch.cat([batch.x for batch in batches])[torch.cat([b.indices for b in batches]).argsort()]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("loader", LOADERS)
def test_loaders_agree_and_restart(loader: str, name: str) -> None:
    expected = list(make("resident", images(), **options(name)).epoch(3))
    made = make(loader, images(), **options(name))
    assert_same(list(made.epoch(3)), expected)
    assert_same(list(made.epoch(3, 2)), expected[2:])


@pytest.mark.parametrize("loader", LOADERS)
def test_layout_and_padding_are_kept(loader: str) -> None:
    given = {**options("everything"), "pad_mode": "reflect"}
    expected = list(make("resident", images(), **given).epoch(1))
    got = list(make(loader, images(), **given, channels_last=True).epoch(1))
    assert_same(got, expected)
    assert all(batch.x.is_contiguous(memory_format=torch.channels_last) for batch in got)
    assert all(batch.x.is_contiguous() for batch in expected)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", ALL)
def test_ranks_together_are_one_process(name: str, ranks: int) -> None:
    """43 images in batches of 8: the last has 3, of which every rank takes all."""
    whole = list(make("resident", images(), **options(name)).epoch(2))
    by_rank = [
        list(make("resident", images(), ranks=ranks, rank=rank, **options(name)).epoch(2))
        for rank in range(ranks)
    ]
    assert [part.share.replicated for part in by_rank[0]] == [False] * 5 + [True]
    for batch, *parts in zip(whole, *by_rank, strict=True):
        for part in parts:
            rows = torch.tensor([*part.share.positions])
            for field in ("x", "labels", "indices", "targets"):
                assert torch.equal(getattr(part, field), getattr(batch, field)[rows])


@pytest.mark.parametrize("loader", LOADERS)
def test_with_extra_images_too(loader: str, tmp_path: Path) -> None:
    """Positions of extra images draw like all others, and pair with any."""
    store = packed_npz(tmp_path, 37)
    assert store.labels is not None
    extended = ExtendedImages(
        random_set(50, (3, 8, 8)), ExtraSet(store, store.labels, (3, 8, 8)), 0.7, replacement=True
    )
    for given in (options("everything"), options("resized")):
        expected = list(make("resident", extended, **given).epoch(1))
        assert max(int(batch.indices.max()) for batch in expected) >= 50
        assert_same(list(make(loader, extended, **given).epoch(1, 3)), expected[3:])
        part = list(make(loader, extended, **given, ranks=2, rank=1).epoch(1))
        for batch, own in zip(expected, part, strict=True):
            rows = torch.tensor([*own.share.positions])
            assert torch.equal(own.x, batch.x[rows])
            assert torch.equal(own.targets, batch.targets[rows])


@pytest.mark.parametrize("loader", LOADERS[1:])
def test_ranks_of_a_loader_that_streams(loader: str) -> None:
    whole = list(make("resident", images(), **options("everything")).epoch(2))
    part = list(make(loader, images(), ranks=2, rank=1, **options("everything")).epoch(2))
    for batch, own in zip(whole, part, strict=True):
        assert torch.equal(own.x, batch.x[torch.tensor([*own.share.positions])])


@pytest.mark.parametrize("name", ALL)
def test_order_crops_and_flips_are_those_of_a_run_without(name: str) -> None:
    """Where an augmentation leaves an image alone it is what a run without that augmentation shows."""
    plain = list(make("resident", images()).epoch(1))
    changed = list(make("resident", images(), **options(name)).epoch(1))
    assert all(torch.equal(a.indices, b.indices) for a, b in zip(plain, changed, strict=True))
    if name == "resized":
        return
    same = torch.cat([(a.x == b.x).flatten() for a, b in zip(plain, changed, strict=True)])
    assert 0.02 < same.float().mean() < 1


@pytest.mark.parametrize("name", ALL)
def test_epochs_and_seeds_differ_and_torchs_random_state_is_untouched(name: str) -> None:
    state = torch.get_rng_state()
    made = make("resident", images(), augment="none", **options(name))
    other = make("resident", images(), augment="none", **{**options(name), "seed": 6})
    epochs = [in_order([*loader.epoch(epoch)]) for loader, epoch in ((made, 0), (made, 1), (other, 0))]
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], epochs[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_more_passes_have_draws_of_their_own() -> None:
    made = make("resident", images(16), augment="none", epoch_steps=4, **options("erasing"))
    batches = list(made.epoch(0))
    first, second = map(in_order, (batches[:2], batches[2:]))
    assert not torch.equal(first, second)


def test_nothing_turned_on_is_the_fused_operator() -> None:
    config = AugmentationConfig()
    assert stages_of(config, INFO) == ()
    assert Mixing.of(config, 10) is None
    assert ResizedCrop.of(config) is None
    data, plan = images(), plan_epoch(43, pad=3, seed=5, epoch=0)
    first = next(make("resident", data, stages=(), mixing=None).epoch(0))
    taken = plan.order[:8], plan.shifts[:, :8], plan.flips[:8]
    assert torch.equal(first.x, ops.augment(data.images, *taken, pad=3))
    assert first.mixed is None


@pytest.mark.gpu
@needs("gpu")
@pytest.mark.parametrize("name", ALL)
def test_a_gpu_gives_nearly_the_same(name: str) -> None:
    expected = list(make("resident", images(), **options(name)).epoch(1))
    for a, b in zip(
        make("resident", images(), device="cuda", **options(name)).epoch(1), expected, strict=True
    ):
        assert torch.equal(a.labels.cpu(), b.labels)
        assert ((a.x.cpu() - b.x).abs() > 1.5 / 255).float().mean() < 0.01
