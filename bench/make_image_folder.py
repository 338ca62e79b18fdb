"""Write an image folder of generated JPEGs, in the layout of ImageNet: train/CLASS/*.jpg and val/CLASS/*.jpg.

    python bench/make_image_folder.py FOLDER --train 1800 --val 200 --classes 100 --size 256

Each class has smooth colours of its own, each image its shift, brightness and noise: a network can learn the
classes, and a JPEG has the size and the cost of a photograph's. Equal numbers give equal files.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

COARSE = 8  # points on a side of a class's colours
NOISE = 12.0  # standard deviation, of 255


def colours(label: int, seed: int) -> np.ndarray:
    """The colours of a class, uint8 (COARSE, COARSE, 3)."""
    return np.random.default_rng((seed, label)).integers(0, 256, (COARSE, COARSE, 3), dtype=np.uint8)


def image(label: int, number: int, size: int, seed: int) -> Image.Image:
    """Image `number` of a class: its colours, shifted, brightened and noisy."""
    generator = np.random.default_rng((seed, label, number))
    shift = tuple(generator.integers(-1, 2, 2))
    coarse = Image.fromarray(np.roll(colours(label, seed), shift, axis=(0, 1)))
    smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
    noise = NOISE * generator.standard_normal((size, size, 1), dtype=np.float32)
    return Image.fromarray((smooth * generator.uniform(0.7, 1.0) + noise).clip(0, 255).astype(np.uint8))


def make_image_folder(
    folder: Path, *, train: int, val: int, classes: int, size: int, seed: int = 1, quality: int = 85
) -> None:
    """Write `train` and `val` images of `classes` classes, dealt out evenly, `size` pixels on a side."""
    names = [f"n{label:08d}" for label in range(classes)]
    jobs = []
    for split, count, first in (("train", train, 0), ("val", val, train)):
        for name in names:
            (folder / split / name).mkdir(parents=True, exist_ok=True)
        jobs += [
            (folder / split / names[n % classes] / f"{n:06d}.jpg", n % classes, first + n)
            for n in range(count)
        ]

    def write(job: tuple[Path, int, int]) -> None:
        path, label, number = job
        image(label, number, size, seed).save(path, quality=quality)

    with ThreadPoolExecutor() as threads:
        for _ in threads.map(write, jobs):
            pass


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the images go; made if it is not there")
    parser.add_argument("--train", type=int, default=1800, help="training images")
    parser.add_argument("--val", type=int, default=200, help="validation images")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--size", type=int, default=256, help="pixels on a side")
    parser.add_argument("--seed", type=int, default=1)
    make_image_folder(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
