"""Image folders, DIR/train/CLASS/* and DIR/test/CLASS/*: surveyed first, then decoded once or per batch."""

import logging
import os
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice, takewhile, zip_longest
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdynat.data.decode import Cut, cut_out, read_image, read_rgb
from fastdynat.data.image_sets import DatasetInfo, StreamedSource, channel_stats, sampled_content
from fastdynat.data.read_ahead import check_fits, pool, read_in_order
from fastdynat.data.split import stratified_split
from fastdynat.data.survey import files_left_out, other_size, survey
from fastdynat.errors import UserError

logger = logging.getLogger(__name__)

# The content decides the format of a file; the suffix marks it as an image.
SUFFIXES = (
    ".bmp",
    ".gif",
    ".jfif",
    ".jpe",
    ".jpeg",
    ".jpg",
    ".pbm",
    ".pgm",
    ".png",
    ".pnm",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)
DROPPINGS = frozenset({"thumbs.db", "desktop.ini"})  # of file managers; not worth a word, like hidden files
TEST_NAMES = ("test", "val", "valid")
LEAST_CLASSES = 2
DECODE_CHUNK = 64  # files per task: long enough to hide the pool's overhead, short enough to spread
STATS_IMAGES, STATS_BATCH = 2048, 64


@dataclass(frozen=True)
class Files:
    """One split on disk: class names in alphabetical order; one path and one int64 label per image.

    The images take turns by class (the first of each, the second of each, ...), so that any prefix is
    balanced. left_out: in words, what lies beside them and is not taken; "" if nothing.
    """

    class_names: tuple[str, ...]
    paths: tuple[Path, ...]
    labels: Tensor
    left_out: str


@dataclass(frozen=True)
class FileSet:
    """Images that stay in their files until they are read.

    paths: (N,) file names as bytes, in one array, because the reference counts of N objects would have every
    worker process copy them. labels: int64 (N,). shape: (C, H, W) of the images, after resizing to
    `image_size` if that is given.
    dali_problem: the first file that DALI would read differently, and why; "" where there is none.
    """

    paths: np.ndarray
    labels: Tensor
    shape: tuple[int, int, int]
    image_size: int | None
    dali_problem: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Tensor, cuts: Sequence[Cut] | None = None) -> Tensor:
        """Decode the images at `indices`, one after the other, to uint8 (n, C, H, W).

        cuts: the part of each file's image that is taken, and resized to (H, W); None takes `image_size`.

        Raises: UserError naming the first file that cannot be decoded or has another size.
        """
        batch = np.empty((len(indices), *self.shape), dtype=np.uint8)
        if cuts is not None:
            for row, name, cut in zip(batch, self.paths[indices.numpy()], cuts, strict=True):
                part = cut_out(read_image(Path(os.fsdecode(name))), cut, self.shape[1:])
                row[:] = np.asarray(part).transpose(2, 0, 1)
            return torch.from_numpy(batch)
        for row, name in zip(batch, self.paths[indices.numpy()], strict=True):
            row[:] = _decode_one(Path(os.fsdecode(name)), self.shape, self.image_size)
        return torch.from_numpy(batch)

    def part(self, rows: slice | Tensor) -> "FileSet":
        paths = self.paths[rows if isinstance(rows, slice) else rows.numpy()]
        return replace(self, paths=paths, labels=self.labels[rows])

    def checksum(self) -> int:
        """Checksum of labels, class names, file names and sizes: no decoding, and the folder may move."""
        total = zlib.crc32(self.labels.contiguous().numpy().data)
        for name in self.paths:
            folder, file = os.path.split(name)
            total = zlib.crc32(b"%b/%b %d" % (os.path.basename(folder), file, os.stat(name).st_size), total)
        return total

    def content(self) -> int:
        return sampled_content(lambda n: Path(os.fsdecode(self.paths[n])).read_bytes(), len(self))


def open_imagefolder(
    data_dir: str | Path | None,
    split: str,
    *,
    image_size: int | None,
) -> tuple[DatasetInfo, StreamedSource]:
    """Return facts and the "train" or "test" split of the folder; the latter is in test, val or valid.

    Every file of the split is looked at (`survey`), and with the training split also those of the test split,
    so that an evaluation does not fail after the training. What is left out, dropped or missing is logged.

    The mean and standard deviation are those of 2,048 training images (of all, if fewer), drawn alike from
    every class; so both splits report the same, whatever is later held out and however it is loaded. Only
    these are decoded here.

    Raises: UserError for missing, empty or differing folders and for a file that cannot be decoded or has
    another size.
    """
    if data_dir is None or not Path(data_dir).is_dir():
        raise UserError(
            f"--data imagefolder needs --data-dir DIR, a folder with train/CLASS/*.jpg; {str(data_dir)!r} is "
            "not one"
        )
    root = Path(data_dir)
    train = list_files(root / "train")
    shape = _image_shape(train.paths[0], image_size)
    test = _test_split(root, train, needed=split == "test")
    files = train if split == "train" or test is None else test
    found = survey(files.paths, shape, image_size, decode=False)
    notices = [files.left_out, *found.notices]
    if split == "train" and test is not None:
        notices += [test.left_out, *survey(test.paths, shape, image_size, decode=True).notices]
    for notice in filter(None, notices):
        logger.info(notice)
    source = _source(train, shape, image_size, [""] * len(train.paths))
    info = image_facts("imagefolder", train.class_names, source, shape)
    return info, _source(files, shape, image_size, found.dali)


def image_facts(
    name: str, class_names: tuple[str, ...], train: StreamedSource, shape: tuple[int, int, int]
) -> DatasetInfo:
    """Facts about images (C, H, W) of `shape` in files, whose mean and deviation are those of a sample."""
    num_sampled = max(STATS_IMAGES, len(class_names))
    sample, _ = stratified_split(train.labels, val_size=0, limit=num_sampled, seed=0)
    mean, std = channel_stats(read_in_order(train.files(sample), STATS_BATCH, len(sample)))
    return DatasetInfo(
        name=name,
        num_classes=len(class_names),
        image_shape=shape,
        class_names=class_names,
        mean=mean,
        std=std,
        augment="crop-flip",
    )


def _source(
    files: Files, shape: tuple[int, int, int], image_size: int | None, dali: Sequence[str]
) -> StreamedSource:
    def chosen(indices: Tensor) -> list[Path]:
        return [files.paths[i] for i in indices.tolist()]

    def streamed(indices: Tensor) -> FileSet:
        odd = next((i for i in indices.tolist() if dali[i]), None)
        problem = "" if odd is None else f"{str(files.paths[odd])!r} is {dali[odd]}"
        return replace(_file_set(files, indices, shape, image_size), dali_problem=problem)

    return StreamedSource(files.labels, lambda indices: decode(chosen(indices), shape, image_size), streamed)


def _file_set(files: Files, indices: Tensor, shape: tuple[int, int, int], image_size: int | None) -> FileSet:
    paths = np.array([os.fsencode(files.paths[i]) for i in indices.tolist()])
    return FileSet(paths, files.labels[indices], shape, image_size)


def list_files(folder: Path) -> Files:
    """List the images of a split folder without opening them; skip hidden names and other file types.

    Raises: UserError where the folder, its class folders or their images are missing or cannot be read.
    """
    if not folder.is_dir():
        raise UserError(
            f"no folder {str(folder)!r}; --data-dir DIR must hold train/CLASS/*.jpg and test/CLASS/*.jpg"
        )
    entries = _entries(folder)
    classes = [entry for entry in entries if entry.is_dir()]
    odd = Counter(_kind(entry) for entry in entries if not entry.is_dir())
    if len(classes) < LEAST_CLASSES:
        raise UserError(
            f"{str(folder)!r} holds {len(classes)} class folder(s); classification needs at least "
            f"{LEAST_CLASSES}"
        )
    by_class = []
    for entry in classes:
        _check_name(entry)
        inside = _entries(entry)
        images = [path for path in inside if path.suffix.lower() in SUFFIXES and not path.is_dir()]
        if not images:
            raise UserError(
                f"class folder {str(entry)!r} holds no image ({', '.join(SUFFIXES)}); add some or remove it"
            )
        taken = set(images)
        odd.update(_kind(path) for path in inside if path not in taken)
        by_class.append(images)
    turns = [
        (path, label)
        for turn in zip_longest(*by_class)
        for label, path in enumerate(turn)
        if path is not None
    ]
    paths, labels = zip(*turns, strict=True)
    names = tuple(entry.name for entry in classes)
    return Files(names, paths, torch.tensor(labels), files_left_out(folder, odd, SUFFIXES) if odd else "")


def _has_classes(folder: Path) -> bool:
    """True with enough class folders. Asks the disk about no file: a flat test folder may have 100,000."""
    with _readable(folder), os.scandir(folder) as entries:
        classes = (e for e in entries if _is_content(e.name) and _leads_to_folder(e))
        return len(list(islice(classes, LEAST_CLASSES))) == LEAST_CLASSES


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    """`entry.is_dir()`, but False for links in a circle."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _entries(folder: Path) -> list[Path]:
    """The folder's entries, sorted, without hidden names and the droppings of file managers."""
    with _readable(folder):
        return sorted(entry for entry in folder.iterdir() if _is_content(entry.name))


def _is_content(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in DROPPINGS


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Say which folder it is where reading it fails."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot read the folder {str(folder)!r} ({error.strerror}); change its permissions"
        ) from None


def _kind(path: Path) -> str:
    """The entry's kind in the words of `files_left_out`."""
    return "folder(s)" if path.is_dir() else path.suffix.lower() or "without a suffix"


def _check_name(entry: Path) -> None:
    """Class names go into documents and tables, which are UTF-8."""
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in entry.name):
        raise UserError(
            f"class folder {str(entry)!r} has a name that cannot be printed; rename it (in UTF-8)"
        )


def _test_split(root: Path, train: Files, *, needed: bool) -> Files | None:
    """The test split, with the classes of the training split; None where there is none and it is not needed.

    It is the first of `TEST_NAMES` with class folders: ILSVRC has labels in val, and a flat test without any.
    The others are not used, which is logged, and those behind it are not read.

    Raises: UserError where it is needed and missing, and for other classes.
    """
    folders = [root / name for name in TEST_NAMES if os.path.isdir(root / name)]
    flat = list(takewhile(lambda each: not _has_classes(each), folders))
    folder = next(iter(folders[len(flat) :] or folders), None)
    if folder is None:
        missing = (
            f"{str(root)!r} holds no test images; --data-dir DIR must hold one of {', '.join(TEST_NAMES)}"
        )
        if needed:
            raise UserError(missing)
        logger.warning("%s for fastdynat eval; training does not need it", missing)
        return None
    test = list_files(folder)
    for other in folders:
        if other != folder:
            lacks = ", which has no class folders," if other in flat else ""
            logger.info("%r%s is not used: the test images are those in %r", str(other), lacks, folder.name)
    if test.class_names != train.class_names:
        odd = sorted(set(test.class_names) ^ set(train.class_names))[0]
        without = folder if odd in train.class_names else root / "train"
        raise UserError(
            f"class folder {odd!r} is in only one of the training and test folders of {str(root)!r}: "
            f"{str(without)!r} has none; add it there or remove it"
        )
    return test


def decode(paths: Sequence[Path], shape: tuple[int, int, int], image_size: int | None) -> Tensor:
    """Decode files to RGB, uint8 (N, 3, H, W), on a thread pool (Pillow decodes without the GIL).

    Raises: UserError naming the first file that cannot be decoded or has another size; or where the images
    would take more than half of the memory that is available to this process.
    """
    check_fits(len(paths), shape)
    store = np.empty((len(paths), *shape), dtype=np.uint8)

    def fill(start: int) -> None:
        for index in range(start, min(start + DECODE_CHUNK, len(paths))):
            store[index] = _decode_one(paths[index], shape, image_size)

    with pool() as threads:
        # Results come in order, so the first error raised is that of the first bad file; the rest is
        # cancelled.
        for _ in threads.map(fill, range(0, len(paths), DECODE_CHUNK)):
            pass
    return torch.from_numpy(store)


def _decode_one(path: Path, shape: tuple[int, int, int], image_size: int | None) -> np.ndarray:
    pixels = read_rgb(path, image_size)
    if pixels.shape != shape:
        raise other_size(path, pixels.shape[1:], shape)
    return pixels


def _image_shape(path: Path, image_size: int | None) -> tuple[int, int, int]:
    if image_size is not None:
        return (3, image_size, image_size)
    channels, height, width = read_rgb(path, None).shape
    return (channels, height, width)
