"""Images per second of each augmentation, and a sheet of pictures of what it does.

    python bench/augmentation.py --size 32 --batch-size 128
    python bench/augmentation.py --sheet docs/images/augmentation.jpg

One thread, on the CPU; the torch loader has one worker process. The better of two epochs of 2,048 images of
32 pixels per side, or of two batches of larger ones. The sheet shows the photographs china.jpg and flower.jpg
of scikit-learn (danielbuechele and vultilion, CC BY 2.0).
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from fastdynat.config import AugmentationConfig
from fastdynat.config.train_checks import check_values
from fastdynat.data import DatasetInfo, ImageSet, TrainLoader, make_loader
from fastdynat.data.augmentation import stages_of
from fastdynat.data.augmentation.resized_crop import ResizedCrop
from fastdynat.data.mixing import Mixing

CASES = {
    "crop and flip": {},
    "--scale 0.3 1": {"scale": (0.3, 1.0)},
    "--color-jitter 0.4": {"color_jitter": 0.4},
    "--aa randaugment:2:14": {"aa": "randaugment:2:14"},
    "--aa trivialaugment": {"aa": "trivialaugment"},
    "--aa autoaugment:cifar10": {"aa": "autoaugment:cifar10"},
    "--aa rand-m9-mstd0.5-inc1": {"aa": "rand-m9-mstd0.5-inc1"},
    "--aa idbh-strong": {"aa": "idbh-strong"},
    "--cutout HALF": {"cutout": 0},
    "--reprob 1": {"reprob": 1.0},
    "--mixup 0.8": {"mixup": 0.8},
    "--cutmix 1": {"cutmix": 1.0},
}
IMAGES = {32: 2048}
CELL, COLUMNS, TITLE = 60, 8, 170


def loader(case: str, images: ImageSet, name: str, batch_size: int) -> TrainLoader:
    """The loader `name` of `images` with an augmentation of `CASES`."""
    side = images.shape[1]
    options = {**CASES[case], **({"cutout": side // 2} if "cutout" in case else {})}
    config = AugmentationConfig(**options)
    check_values(config)
    info = DatasetInfo("", 10, images.shape, tuple("0123456789"), (0.47,) * 3, (0.25,) * 3, "crop-flip")
    return make_loader(
        name,
        images,
        workers=1,
        batch_size=batch_size,
        augment="flip" if config.crops else "crop-flip",
        pad=side // 8,
        seed=3,
        device="cpu",
        stages=stages_of(config, info),
        mixing=Mixing.of(config, 10),
        resized_crop=ResizedCrop.of(config),
    )


def speed(made: TrainLoader) -> float:
    """Images per second of the better of two epochs."""
    best = 0.0
    for epoch in range(2):
        begin = time.perf_counter()
        images = sum(len(batch.labels) for batch in made.epoch(epoch))
        best = max(best, images / (time.perf_counter() - begin))
    return best


def smooth_images(count: int, side: int) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(count, 3, 8, 8, generator=generator)
    images = F.interpolate(small, size=(side, side), mode="bilinear").mul(255).byte()
    return ImageSet(images, torch.randint(10, (count,), generator=generator))


def sheet(path: Path) -> None:
    """Draw a row of pictures for each case."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(np.array(image)) for image in load_sample_images().images]
    square = [photo.crop((120, 20, 520, 420)).resize((CELL, CELL)) for photo in photographs]
    pixels = torch.from_numpy(np.stack([np.array(square[i % 2]) for i in range(COLUMNS)])).permute(0, 3, 1, 2)
    images = ImageSet(pixels.contiguous(), torch.arange(COLUMNS))
    page = Image.new("RGB", (TITLE + COLUMNS * CELL, len(CASES) * CELL), "white")
    for row, case in enumerate(CASES):
        ImageDraw.Draw(page).text((4, row * CELL + CELL // 2 - 5), case, fill="black")
        batch = next(iter(loader(case, images, "resident", COLUMNS).epoch(0)))
        for column, x in enumerate(batch.x):
            picture = Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy())
            page.paste(picture, (TITLE + column * CELL, row * CELL))
    page.save(path, quality=80)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--sheet", type=Path)
    options = parser.parse_args()
    if options.sheet:
        return sheet(options.sheet)
    torch.set_num_threads(1)
    images = smooth_images(IMAGES.get(options.size, 2 * options.batch_size), options.size)
    for case in CASES:
        found = [speed(loader(case, images, name, options.batch_size)) for name in ("resident", "torch")]
        print(f"{case:28}resident {found[0]:9,.0f}   torch {found[1]:9,.0f}  images/s", flush=True)


if __name__ == "__main__":
    main()
