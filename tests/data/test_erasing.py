"""Random erasing and cutout: against torchvision's class and one pixel at a time."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from fastdynat.data.augmentation.erasing import Cutout, Erasing, box_mask
from fastdynat.ops.image_draws import ImageDraws


def draws(count: int, seed: int = 0) -> ImageDraws:
    return ImageDraws.of(seed, range(count), "cpu")


def grey(count: int, height: int = 16, width: int = 20) -> torch.Tensor:
    return torch.full((count, 3, height, width), 200, dtype=torch.uint8)


@pytest.mark.parametrize("size", [1, 4, 5, 40])
def test_cutout_is_one_square_around_a_pixel(size: int) -> None:
    images = grey(300)
    found = Cutout(size).apply(images, draws(300))
    assert images.eq(200).all()
    for image in found:
        rows, columns = (image[0] == 0).any(1).nonzero().flatten(), (image[0] == 0).any(0).nonzero().flatten()
        assert torch.equal(image == 0, (image[:1] == 0).expand(3, -1, -1))
        assert len(rows) == int(rows.max() - rows.min()) + 1 <= size
        assert len(columns) == int(columns.max() - columns.min()) + 1 <= size
        whole = rows.min() > 0 and rows.max() < 15 and columns.min() > 0 and columns.max() < 19
        if whole:
            assert len(rows) == len(columns) == size
    erased = (found[:, 0] == 0).float().mean(0)
    if size == 1:  # centred anywhere, the border included
        assert erased.sum() == pytest.approx(1, abs=1e-5)
        assert (erased > 0).float().mean() > 0.5
    if size == 40:
        assert (found[:, 0] == 0).flatten(1).float().mean() > 0.95


@pytest.mark.parametrize("shape", [(16, 20), (224, 224), (32, 32), (3, 30)])
def test_rectangles_follow_torchvision(shape: tuple[int, int]) -> None:
    """Height, width and place: means, spreads, and the share of images in which none fits."""
    theirs_of = v2.RandomErasing(p=1.0, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3))
    torch.manual_seed(0)
    image = torch.zeros(3, *shape)
    made = [theirs_of.make_params([image]) for _ in range(4000)]
    theirs = np.array([[m["i"], m["j"], m["h"], m["w"]] for m in made if m["v"] is not None])
    corners, sides = Erasing(1.0).boxes(draws(4000), *shape)
    there = sides[:, 0] > 0
    ours = torch.cat([corners, sides], dim=1)[there].numpy()
    assert len(ours) == pytest.approx(len(theirs), abs=150)
    assert np.allclose(ours.mean(0), theirs.mean(0), rtol=0.06, atol=0.05)
    assert np.allclose(ours.std(0), theirs.std(0), rtol=0.06, atol=0.05)
    assert (corners >= 0).all()
    assert (corners + sides <= torch.tensor(shape))[there].all()


def test_the_share_of_erased_images_and_the_rest_of_each() -> None:
    images, erasing = grey(2000), Erasing(0.25)
    mask = box_mask(images, *erasing.boxes(draws(2000), 16, 20)).expand_as(images)
    assert torch.equal(erasing.apply(images, draws(2000)), images.masked_fill(mask, 0))
    noisy = Erasing(0.25, noise=((0.5, 0.2, 0.9), (0.1, 0.1, 0.2)))
    found = noisy.apply(images, draws(2000))
    assert (found[~mask] == 200).all()
    assert mask.flatten(1).any(1).float().mean() == pytest.approx(0.25, abs=0.03)
    for channel, (mean, std) in enumerate(((127.5, 25.5), (51, 25.5))):
        noise = found[:, channel][mask[:, channel]].float()
        assert noise.mean() == pytest.approx(mean, abs=1)
        assert noise.std() == pytest.approx(std, abs=1)
    assert found[:, 2][mask[:, 2]].float().max() == 255
    assert images.eq(200).all()


def test_noise_belongs_to_its_position() -> None:
    """The same alone as in a batch, whether the others are erased or not."""
    erasing = Erasing(0.5, noise=((0.5,) * 3, (0.3,) * 3))
    found = erasing.apply(grey(40), draws(40))
    for position in range(40):
        alone = erasing.apply(grey(1), ImageDraws.of(0, [position], "cpu"))
        assert torch.equal(alone[0], found[position])
