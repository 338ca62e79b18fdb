"""Every loader on the same random images."""

import pytest
import torch
from conftest import needs

from fastdynat.data import (
    ImageSet,
    TrainLoader,
    make_loader,
)
from fastdynat.data.imagefolder import FileSet

PAD = 3


DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs("gpu")])]


DALI = needs("dali")


LOADERS = [
    "resident",
    pytest.param("torch", id="torch"),
    pytest.param("torch-0"),
    pytest.param("dali", marks=DALI),
]


def random_set(num_images: int, shape: tuple[int, int, int] = (3, 8, 9)) -> ImageSet:
    generator = torch.Generator().manual_seed(num_images)
    images = torch.randint(256, (num_images, *shape), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.randint(10, (num_images,), generator=generator))


def make(name: str, images: ImageSet | FileSet, **options: object) -> TrainLoader:
    name, _, workers = name.partition("-")
    options = {"batch_size": 8, "augment": "crop-flip", "pad": PAD, "seed": 5, "device": "cpu", **options}
    return make_loader(name, images, workers=int(workers or 2), **options)
