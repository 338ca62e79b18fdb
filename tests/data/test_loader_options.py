"""Reflected crops and epochs of any length: all loaders agree, with numpy and the published sampler."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support.loaders import DEVICES, LOADERS, PAD, make, random_set
from torch import Tensor

from fastdynat.data.epoch_plan import EpochSteps, plan_epoch
from fastdynat.data.imagefolder import open_imagefolder
from fastdynat.errors import UserError
from fastdynat.ops.augment import crop, reflect


@pytest.mark.parametrize("shape", [(1, 5, 5), (3, 8, 9), (3, 5, 12)])
def test_reflection_is_numpys(shape: tuple[int, int, int]) -> None:
    images = random_set(4, shape).images
    for pad in range(min(shape[1:])):
        want = np.pad(images.numpy(), [(0, 0), (0, 0), (pad, pad), (pad, pad)], mode="reflect")
        assert np.array_equal(reflect(images, pad).numpy(), want)


def test_a_reflection_wider_than_the_image_is_refused() -> None:
    images = random_set(8, (1, 4, 9))
    with pytest.raises(
        UserError, match=r"4x9 images cannot be padded by reflecting 4 pixels; use --pad-mode zeros"
    ):
        make("resident", images, pad=4, pad_mode="reflect")
    with pytest.raises(UserError, match="cannot be padded"):
        next(make("torch-0", images, pad=4, pad_mode="reflect").epoch(0))
    make("resident", images, pad=4, pad_mode="reflect", augment="flip")  # takes no crops
    with pytest.raises(UserError, match="pad mode"):
        make("resident", images, pad_mode="mirror")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("augment", ["crop", "crop-flip"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader_reflects(loader: str, device: str, augment: str, channels_last: bool) -> None:
    images = random_set(20)
    made = make(
        loader, images, augment=augment, pad_mode="reflect", channels_last=channels_last, device=device
    )
    batches = list(made.epoch(2))
    plan = plan_epoch(20, pad=PAD, seed=5, epoch=2)
    got = torch.cat([batch.x.cpu() for batch in batches])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert all(batch.x.is_contiguous(memory_format=layout) for batch in batches)
    for position in range(20):
        image = images.images[int(plan.order[position])].numpy()
        padded = np.pad(image, [(0, 0), (PAD, PAD), (PAD, PAD)], mode="reflect")
        top, left = (int(s) for s in plan.shifts[:, position])
        want = padded[:, top : top + 8, left : left + 9]
        want = want[:, :, ::-1] if "flip" in augment and bool(plan.flips[position]) else want
        assert torch.equal(got[position], torch.from_numpy(want.copy()).float() / 255)


@pytest.mark.parametrize("loader", LOADERS)
def test_files_are_reflected_like_images_in_memory(loader: str, tmp_path: Path) -> None:
    from PIL import Image

    images = random_set(12, (3, 8, 8)).images
    for index, image in enumerate(images):
        folder = tmp_path / "train" / f"class{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index:02d}.png")
    info, source = open_imagefolder(tmp_path, "train", image_size=None)
    everything = torch.arange(12)
    in_memory = source.take(everything, info)
    made = make(loader, in_memory if loader == "resident" else source.files(everything), pad_mode="reflect")
    want = list(make("resident", in_memory, pad_mode="reflect").epoch(1))
    for a, b in zip(made.epoch(1), want, strict=True):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.labels, b.labels)


def published_sampler(num_images: int, batch: int, steps: int) -> list[tuple[int, int]]:
    """DyART's loop: fresh permutations in batches, the last of each short, until enough: (pass, size)."""
    out: list[tuple[int, int]] = []
    number = 0
    while len(out) < steps:
        for begin in range(0, num_images, batch):
            if len(out) == steps:
                break
            out.append((number, min(batch, num_images - begin)))
        number += 1
    return out


@pytest.mark.parametrize(
    ("num_images", "batch", "steps"), [(48_976, 256, 196), (20, 8, 7), (20, 8, 3), (20, 8, 2), (16, 8, 5)]
)
def test_steps_are_cut_as_the_published_sampler_does(num_images: int, batch: int, steps: int) -> None:
    cut = EpochSteps(num_images, batch, epoch_steps=steps)
    assert cut.count == steps
    want = published_sampler(num_images, batch, steps)
    got = [cut.positions(step) for step in range(steps)]
    assert [(p.start // num_images, p.stop - p.start) for p in got] == want
    assert cut.num_positions == sum(size for _, size in want)
    assert cut.passes == want[-1][0] + 1
    halves = [EpochSteps(num_images, batch, epoch_steps=steps, ranks=2, rank=k) for k in (0, 1)]
    for step, whole in enumerate(got):
        dealt = sorted(
            p for half in halves for p in range(halves[0].passes * num_images)[half.positions(step)]
        )
        assert dealt in ([*range(whole.start, whole.stop)], sorted([*range(whole.start, whole.stop)] * 2))


@pytest.mark.parametrize("loader", LOADERS)
def test_more_steps_go_on_with_another_permutation(loader: str) -> None:
    images = random_set(20)
    longer, usual = make(loader, images, epoch_steps=8), make(loader, images)
    batches, single = list(longer.epoch(3)), list(usual.epoch(3))
    assert (longer.steps_per_epoch, usual.steps_per_epoch) == (8, 3)
    assert [len(b.labels) for b in batches] == [8, 8, 4, 8, 8, 4, 8, 8]
    passes = [torch.cat([b.indices for b in batches[at : at + 3]]) for at in (0, 3)]
    assert all(sorted(p.tolist()) == list(range(20)) for p in passes)
    assert not torch.equal(*passes)
    for a, b in zip(batches, single, strict=False):  # the first pass is the usual epoch
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.indices, b.indices)
    plan = plan_epoch(20, pad=PAD, seed=5, epoch=3, passes=3)
    assert torch.equal(torch.cat([b.indices for b in batches]), plan.order[: 40 + 16])
    for start in (1, 3, 5, 7):
        for a, b in zip(longer.epoch(3, start), batches[start:], strict=True):
            assert torch.equal(a.x, b.x)
    assert_crops(batches[5].x, images.images[batches[5].indices], plan.shifts[:, 36:40], plan.flips[36:40])


def assert_crops(x: Tensor, images: Tensor, shifts: Tensor, flips: Tensor) -> None:
    want = crop(images, shifts, PAD)
    want = torch.where(flips.view(-1, 1, 1, 1), want.flip(3), want)
    assert torch.equal(x, want.float() / 255)


def test_fewer_steps_end_the_epoch_early_and_a_state_knows() -> None:
    images = random_set(20)
    shorter, usual = make("resident", images, epoch_steps=2), make("resident", images)
    assert [len(b.labels) for b in shorter.epoch(0)] == [8, 8]
    assert shorter.steps_per_epoch == math.ceil(16 / 8)
    with pytest.raises(UserError, match="images per epoch"):
        usual.load_state_dict(shorter.state_dict())
    again = make("resident", images, epoch_steps=2)
    again.load_state_dict(shorter.state_dict())
