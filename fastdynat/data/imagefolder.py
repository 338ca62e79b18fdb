"""Folders of JPEG or PNG files, DIR/train/CLASS/* and DIR/test/CLASS/*: decoded once, or by a loader batch by batch."""

import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastdynat.data.memory import available_memory
from fastdynat.data.split import stratified_split
from fastdynat.data.store import DatasetInfo, Source, channel_stats
from fastdynat.errors import UserError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm"})
TEST_NAMES = ("test", "val", "valid")
DECODE_CHUNK = 64  # files per task: long enough to hide the pool's overhead, short enough to spread
STATS_IMAGES = 2048


@dataclass(frozen=True)
class Files:
    """One split on disk: class names in alphabetical order; one path and one int64 label per image.

    The images take turns by class (the first of each, the second of each, ...), so that any prefix is balanced.
    """

    class_names: tuple[str, ...]
    paths: tuple[Path, ...]
    labels: Tensor


@dataclass(frozen=True)
class FileSet:
    """Images that stay in their files until they are read.

    paths: (N,) file names as bytes, in one array, because the reference counts of N objects would have every worker process
    copy them. labels: int64 (N,). shape: (C, H, W) of the images, after resizing to `image_size` if that is given.
    """

    paths: np.ndarray
    labels: Tensor
    shape: tuple[int, int, int]
    image_size: int | None

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Tensor) -> Tensor:
        """Decode the images at `indices`, one after the other, to uint8 (n, C, H, W).

        Raises: UserError naming the first file that cannot be decoded or has another size.
        """
        batch = np.empty((len(indices), *self.shape), dtype=np.uint8)
        for row, name in zip(batch, self.paths[indices.numpy()], strict=True):
            row[:] = _decode_one(Path(os.fsdecode(name)), self.shape, self.image_size)
        return torch.from_numpy(batch)

    def checksum(self) -> int:
        """Of labels, class and file names and file sizes: the folder may move, and nothing is decoded for it."""
        total = zlib.crc32(self.labels.contiguous().numpy().data)
        for name in self.paths:
            folder, file = os.path.split(name)
            total = zlib.crc32(b"%b/%b %d" % (os.path.basename(folder), file, os.stat(name).st_size), total)
        return total


@dataclass(frozen=True)
class FileSource(Source):
    """A split in files: besides being read at once, it can be handed to a loader as it is."""

    files: Callable[[Tensor], FileSet]


def open_imagefolder(data_dir: str | Path | None, split: str, *, image_size: int | None) -> tuple[DatasetInfo, FileSource]:
    """Return facts and the "train" or "test" split of the folder; the test split may be named test, val or valid.

    The mean and standard deviation are those of 2,048 training images (of all, if fewer), drawn alike from every class;
    so both splits report the same, whatever is later held out and however it is loaded. Only these are decoded here.

    Raises: UserError for missing, empty or differing folders and for a file that cannot be decoded.
    """
    if data_dir is None or not Path(data_dir).is_dir():
        raise UserError(f"--data imagefolder needs --data-dir DIR, a folder with train/CLASS/*.jpg; {str(data_dir)!r} is none")
    root = Path(data_dir)
    train = list_files(root / "train")
    files = train if split == "train" else list_files(_test_folder(root))
    if files.class_names != train.class_names:
        odd = sorted(set(files.class_names) ^ set(train.class_names))[0]
        raise UserError(f"class folder {odd!r} is in only one of the training and test folders of {str(root)!r}")

    shape = _image_shape(train.paths[0], image_size)
    num_sampled = max(STATS_IMAGES, len(train.class_names))
    sample, _ = stratified_split(train.labels, val_size=0, limit=num_sampled, seed=0)
    mean, std = channel_stats(decode([train.paths[i] for i in sample.tolist()], shape, image_size))
    info = DatasetInfo(
        name="imagefolder",
        num_classes=len(train.class_names),
        image_shape=shape,
        class_names=train.class_names,
        mean=mean,
        std=std,
        augment="crop-flip",
    )

    def chosen(indices: Tensor) -> list[Path]:
        return [files.paths[i] for i in indices.tolist()]

    return info, FileSource(
        files.labels,
        lambda indices: decode(chosen(indices), shape, image_size),
        lambda indices: FileSet(np.array([os.fsencode(p) for p in chosen(indices)]), files.labels[indices], shape, image_size),
    )


def list_files(folder: Path) -> Files:
    """List the images of a split folder without opening them; hidden names and other file types are passed over.

    Raises: UserError where the folder, its class folders or their images are missing.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {str(folder)!r}; --data-dir DIR must hold train/CLASS/*.jpg and test/CLASS/*.jpg")
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(classes) < 2:
        raise UserError(f"{str(folder)!r} holds {len(classes)} class folder(s); classification needs at least 2")
    by_class = []
    for entry in classes:
        images = sorted(p for p in entry.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
        if not images:
            raise UserError(
                f"class folder {str(entry)!r} holds no image ({', '.join(sorted(SUFFIXES))}); add some or remove it"
            )
        by_class.append(images)
    turns = [(path, label) for turn in zip_longest(*by_class) for label, path in enumerate(turn) if path is not None]
    paths, labels = zip(*turns, strict=True)
    return Files(tuple(entry.name for entry in classes), paths, torch.tensor(labels))


def _test_folder(root: Path) -> Path:
    for name in TEST_NAMES:
        if (root / name).is_dir():
            return root / name
    raise UserError(f"{str(root)!r} holds no test images; --data-dir DIR must hold one of {', '.join(TEST_NAMES)}")


def decode(paths: Sequence[Path], shape: tuple[int, int, int], image_size: int | None) -> Tensor:
    """Decode files to RGB, uint8 (N, 3, H, W), on a pool of threads (Pillow decodes without the interpreter lock).

    Raises: UserError naming the first file that cannot be decoded or has another size; or where the images would take
    more than half of the memory that is available.
    """
    needed, available = len(paths) * shape[0] * shape[1] * shape[2], available_memory()
    if available is not None and needed > available / 2:
        raise UserError(
            f"{len(paths)} images of {shape[1]}x{shape[2]} take {needed / 2**30:.2f} GiB, more than half of the "
            f"{available / 2**30:.2f} GiB of memory available; pass a smaller --image-size, or for training images a "
            "--train-size, or --loader dali or torch, which keep none in memory"
        )
    store = np.empty((len(paths), *shape), dtype=np.uint8)

    def fill(start: int) -> None:
        for index in range(start, min(start + DECODE_CHUNK, len(paths))):
            store[index] = _decode_one(paths[index], shape, image_size)

    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        # Results come in order, so the first error raised is that of the first bad file; the rest is cancelled.
        for _ in pool.map(fill, range(0, len(paths), DECODE_CHUNK)):
            pass
    return torch.from_numpy(store)


def _decode_one(path: Path, shape: tuple[int, int, int], image_size: int | None) -> np.ndarray:
    pixels = _open_rgb(path, image_size)
    if pixels.shape != shape:
        raise UserError(
            f"{str(path)!r} is {pixels.shape[1]}x{pixels.shape[2]} but the first image is {shape[1]}x{shape[2]}; "
            "pass --image-size to resize all of them"
        )
    return pixels


def _open_rgb(path: Path, image_size: int | None) -> np.ndarray:
    """Return a file as uint8 (3, H, W); if image_size is given, shorter side resized to it and the centre cut out."""
    try:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
    except Exception as error:  # decoders raise many kinds on damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot decode image {str(path)!r} ({reason}); replace or remove the file") from error
    if image_size is not None and rgb.size != (image_size, image_size):
        scale = image_size / min(rgb.size)
        width, height = (max(image_size, round(side * scale)) for side in rgb.size)
        left, top = (width - image_size) // 2, (height - image_size) // 2
        rgb = rgb.resize((width, height), Image.Resampling.BILINEAR)
        rgb = rgb.crop((left, top, left + image_size, top + image_size))
    return np.asarray(rgb).transpose(2, 0, 1)


def check_eight_bits(files: FileSet) -> None:
    """Raise UserError where the first file has more than 8 bits per channel, which decoders reduce in different ways."""
    path = Path(os.fsdecode(files.paths[0]))
    with Image.open(path) as image:
        if image.mode.startswith(("I", "F")):
            raise UserError(f"{str(path)!r} has more than 8 bits ({image.mode}): convert the images, or use --loader torch")


def _image_shape(path: Path, image_size: int | None) -> tuple[int, int, int]:
    if image_size is not None:
        return (3, image_size, image_size)
    channels, height, width = _open_rgb(path, None).shape
    return (channels, height, width)
