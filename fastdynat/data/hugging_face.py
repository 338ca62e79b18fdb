"""Data of Hugging Face `datasets`, ``hf:NAME_OR_FOLDER``: parquet files or a data set of the hub.

The library keeps the encoded images in Arrow files that are mapped into memory, so any row can be read at any
time and processes on one machine share the pages.
"""

import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdynat.data.decode import Cut, EncodedImage, cut_out, read_image, read_rgb
from fastdynat.data.image_sets import DatasetInfo, StreamedSource, check_label_values, sampled_content
from fastdynat.data.imagefolder import image_facts
from fastdynat.data.read_ahead import read_whole
from fastdynat.data.survey import other_size
from fastdynat.errors import UserError, first_line
from fastdynat.user_code import HUB

TRAIN, TESTS = "train", ("test", "validation", "valid", "val")
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")  # of several columns of classes the first of these is taken
HIDDEN = -1  # the label of every image in a test split whose labels are not published


@dataclass(frozen=True)
class TableImages:
    """Images encoded in the rows of a table.

    Attributes:
        table: a `datasets.Dataset` whose only column, `image`, is not decoded.
        name: of data set and split, for messages.
        rows: int64 (N,), the row of each image.
        labels: int64 (N,).
        shape: (C, H, W) of the images, after resizing to `image_size` if that is given.
    """

    table: Any
    name: str
    rows: Tensor
    labels: Tensor
    shape: tuple[int, int, int]
    image_size: int | None

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Tensor, cuts: Sequence[Cut] | None = None) -> Tensor:
        """Decode the images at `indices`, one after the other, to uint8 (n, C, H, W).

        cuts: the part of each encoded image that is taken, and resized to (H, W); None takes `image_size`.

        Raises: UserError naming the first row that cannot be decoded or has another size.
        """
        batch = np.empty((len(indices), *self.shape), dtype=np.uint8)
        if cuts is not None:
            for pixels, row, cut in zip(batch, self.rows[indices].tolist(), cuts, strict=True):
                whole = read_image(encoded_row(self.table, row, self.name))
                pixels[:] = np.asarray(cut_out(whole, cut, self.shape[1:])).transpose(2, 0, 1)
            return torch.from_numpy(batch)
        for pixels, row in zip(batch, self.rows[indices].tolist(), strict=True):
            image = encoded_row(self.table, row, self.name)
            found = read_rgb(image, self.image_size)
            if found.shape != self.shape:
                raise other_size(image, found.shape[1:], self.shape)
            pixels[:] = found
        return torch.from_numpy(batch)

    def part(self, rows: slice | Tensor) -> "TableImages":
        return replace(self, rows=self.rows[rows], labels=self.labels[rows])

    def checksum(self) -> int:
        """Checksum of labels, rows and sizes of the encoded images; no decoding, and the files may move."""
        sizes = _sizes(self.table)[self.rows.numpy()]
        total = zlib.crc32(self.labels.contiguous().numpy().data)
        for values in (self.rows.numpy(), sizes):
            total = zlib.crc32(np.ascontiguousarray(values).data, total)
        return total

    def content(self) -> int:
        """As of `Images`, with name and size of every image that lies in a file of its own."""
        rows = self.rows.tolist()
        total = sampled_content(lambda n: encoded_row(self.table, rows[n], self.name).data, len(rows))
        paths = _paths(self.table)
        for row in rows:
            if path := paths[row]:
                folder, file = os.path.split(os.fsencode(path))
                told = (os.path.basename(folder), file, _size_of_file(path, row, self.name))
                total = zlib.crc32(b"%b/%b %d" % told, total)
        return total


@dataclass(frozen=True)
class _Split:
    """A split: its table of images, and the label of each row."""

    table: Any
    labels: Tensor
    class_names: tuple[str, ...] | None  # None where labels are plain numbers


def open_hugging_face(
    name: str, split: str, *, image_size: int | None, download: bool
) -> tuple[DatasetInfo, StreamedSource]:
    """Return facts and the "train" or "test" split of the data ``hf:NAME_OR_FOLDER``.

    The test split is the first labelled one of `TESTS`. Images keep their order; where that is the order of
    the classes they take turns by class, so that any prefix is balanced. Only the images for mean and
    standard deviation are decoded here.

    Raises: UserError where the library, a split or a column is missing, a label is no class, or an image that
        is read here cannot be decoded or has another size.
    """
    splits = _load(name, download=download)
    if TRAIN not in splits:
        raise UserError(f"{name} has no split {TRAIN!r}; its splits are {', '.join(splits)}")
    train = _split(splits[TRAIN], f"{name}, split {TRAIN}")
    names = train.class_names or tuple(map(str, range(int(train.labels.max()) + 1)))
    check_label_values(train.labels, len(names), f"{name}, split {TRAIN}")
    first = encoded_row(train.table, 0, f"{name}, split {TRAIN}")
    shape = (3, image_size, image_size) if image_size is not None else _shape(first)
    source = _source(train, f"{name}, split {TRAIN}", shape, image_size)
    info = image_facts(_title(name), names, source, shape)
    if split == "train":
        return info, source
    which, test = _test_split(splits, name)
    where = f"{name}, split {which}"
    check_label_values(test.labels, len(names), where)
    if test.class_names is not None and test.class_names != names:
        raise UserError(f"{where} has other classes than the split {TRAIN}; give both the same ClassLabel")
    return info, _source(test, where, shape, image_size)


def _title(name: str) -> str:
    """`name`, of a folder with its last part only."""
    place = name.removeprefix(HUB)
    return HUB + (Path(place).name if Path(place).is_absolute() else place)


def _shape(image: EncodedImage) -> tuple[int, int, int]:
    channels, height, width = read_rgb(image, None).shape
    return (channels, height, width)


def _load(name: str, *, download: bool) -> Mapping[str, Any]:
    """All splits of ``hf:NAME_OR_FOLDER``, as `datasets` loads them."""
    place = name.removeprefix(HUB)
    library = _library()
    saved = Path(place, "dataset_dict.json").is_file()
    offline = {} if download else {"download_config": library.DownloadConfig(local_files_only=True)}
    try:
        with _quiet(library):
            found = library.load_from_disk(place) if saved else library.load_dataset(place, **offline)
    except Exception as error:  # the network, files, parsers: all mean the same to the user
        raise UserError(
            f"cannot load {name} ({type(error).__name__}: {first_line(error)}); "
            f"--data {HUB}NAME_OR_FOLDER is a folder of parquet files or a data set of the Hugging Face hub"
        ) from error
    splits: Mapping[str, Any] = found
    return splits


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"--data {HUB}NAME_OR_FOLDER needs the extra: pip install 'fastdynat[datasets]'"
        ) from None
    return datasets


@contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Within it `datasets` shows no progress bars."""
    shown = not library.are_progress_bars_disabled()
    library.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            library.enable_progress_bars()


def _test_split(splits: Mapping[str, Any], name: str) -> tuple[str, _Split]:
    for which in TESTS:
        if which in splits:
            found = _split(splits[which], f"{name}, split {which}")
            if bool((found.labels != HIDDEN).any()):
                return which, found
    raise UserError(f"{name} has no labelled test images: no split {', '.join(TESTS)} with labels")


def _split(data: Any, where: str) -> _Split:
    """The images and labels of a `datasets.Dataset`."""
    library = _library()
    if len(data) == 0:
        raise UserError(f"{where} has no rows")
    image = _image_column(data, where)
    label = _label_column(data, where)
    feature = data.features[label]
    values = data.select_columns([label])[:][label]
    if None in values:
        raise UserError(f"{where}: row {values.index(None)} has no {label}; remove it")
    labels = torch.tensor(values, dtype=torch.int64)
    table = data.select_columns([image]).rename_column(image, "image") if image != "image" else data
    table = table.select_columns(["image"]).cast_column("image", library.Image(decode=False))
    names = tuple(feature.names) if isinstance(feature, library.ClassLabel) else None
    return _Split(table, labels, names)


def _image_column(data: Any, where: str) -> str:
    """The column of images: by its type, or of encoded bytes by its name."""
    library = _library()
    typed = [name for name, feature in data.features.items() if isinstance(feature, library.Image)]
    plain = [name for name in IMAGE_COLUMNS if name in data.features and _holds_bytes(data.features[name])]
    preferred = [name for name in IMAGE_COLUMNS if name in typed]
    if found := (preferred or typed or plain)[:1]:
        return found[0]
    raise UserError(
        f"{where} has no column of images among {', '.join(data.column_names)}; "
        "give one called image, of the type datasets.Image or encoded bytes"
    )


def _holds_bytes(feature: Any) -> bool:
    """True for encoded images whose type was not kept: binary, or as `datasets` writes them."""
    return getattr(feature, "dtype", "") in ("binary", "large_binary") or (
        isinstance(feature, dict) and "bytes" in feature
    )


def _label_column(data: Any, where: str) -> str:
    library = _library()
    classes = [name for name, feature in data.features.items() if isinstance(feature, library.ClassLabel)]
    numbers = [name for name in LABEL_COLUMNS if "int" in str(getattr(data.features.get(name), "dtype", ""))]
    preferred = [name for name in LABEL_COLUMNS if name in classes]
    if preferred or len(classes) == 1:
        return (preferred or classes)[0]
    if numbers and not classes:
        return numbers[0]
    columns = ", ".join(data.column_names)
    problem = "several columns of classes" if classes else "no column of classes"
    raise UserError(f"{where} has {problem} among {columns}; call the one to learn {LABEL_COLUMNS[0]}")


def _source(split: _Split, where: str, shape: tuple[int, int, int], image_size: int | None) -> StreamedSource:
    rows = _order(split.labels)
    images = TableImages(split.table, where, rows, split.labels[rows], shape, image_size)
    return StreamedSource(images.labels, lambda indices: read_whole(images.part(indices)), images.part)


def _order(labels: Tensor) -> Tensor:
    """The rows in their order; in turns by class where they are sorted by class."""
    rows = torch.arange(len(labels))
    if len(labels) < 2 or bool((labels.diff() < 0).any()) or int(labels[0]) == int(labels[-1]):
        return rows
    counts = torch.bincount(labels)
    turn = rows - (counts.cumsum(0) - counts)[labels]  # the number of the row within its class
    return torch.argsort(turn * len(counts) + labels)


def encoded_row(table: Any, row: int, where: str) -> EncodedImage:
    """The encoded image in `row` of a table of images.

    Raises: UserError where there is none, or its file cannot be read.
    """
    name = f"row {row} of {where}"
    value = table[row]["image"]
    data = None if value is None else value["bytes"]
    if data is None and value is not None and value["path"]:
        try:
            data = Path(value["path"]).read_bytes()
        except OSError as error:
            raise UserError(f"{name}: cannot read {value['path']!r} ({error.strerror})") from None
    if data is None:
        raise UserError(f"{name} has no image; remove it")
    return EncodedImage(data, name)


def _paths(table: Any) -> list[str | None]:
    """The file of each row's image; None where the row holds the image itself."""
    import pyarrow.compute as compute

    images = table.with_format("arrow")[:].column("image")
    held = compute.is_valid(compute.struct_field(images, "bytes"))
    paths: list[str | None] = compute.if_else(held, None, compute.struct_field(images, "path")).to_pylist()
    return paths


def _size_of_file(path: str, row: int, where: str) -> int:
    """Bytes of the file at `path`. Raises UserError where it is missing."""
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise UserError(f"row {row} of {where}: cannot read {path!r} ({error.strerror})") from None


def _sizes(table: Any) -> np.ndarray:
    """Bytes of each row's encoded image, int64; 0 where the image lies in a file of its own."""
    import pyarrow.compute

    column = pyarrow.compute.struct_field(table.with_format("arrow")[:].column("image"), "bytes")
    return np.array(pyarrow.compute.fill_null(pyarrow.compute.binary_length(column), 0), dtype=np.int64)
