"""Published forms of extra images, read chunk by chunk: .npz, pickles of Carmon et al., image folders."""

import hashlib
import os
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch

from fastdynat.data.decode import read_rgb
from fastdynat.data.extra_store import SourceFile
from fastdynat.data.imagefolder import SUFFIXES, FileSet, list_files
from fastdynat.data.read_ahead import read_in_order
from fastdynat.documents import open_file, regular_file
from fastdynat.documents.array_pickles import PickledArray, read_array_pickle
from fastdynat.errors import UserError

KEYS = {".npz": ("image", "label"), ".pickle": ("data", "extrapolated_targets")}
PICKLES = (".pickle", ".pkl")
MOST_LABEL = 2**31 - 1
DIGEST_BYTES = 2**22

Chunk = tuple[np.ndarray, np.ndarray | None]
Read = Callable[[int], bytes]


class PackSource(Protocol):
    """Images of one file or folder, to be packed.

    Attributes:
        path: the file or folder.
        count: images.
        shape: (C, H, W) of each.
        labelled: False where they have no labels.
        class_names: names of the class folders, by label; None where there are none.
    """

    path: Path
    count: int
    shape: tuple[int, int, int]
    labelled: bool
    class_names: tuple[str, ...] | None

    def chunks(self, size: int) -> Iterator[Chunk]:
        """Yield up to `size` images at a time, uint8 (n, C, H, W), and their labels (n,), or None."""

    def about(self) -> SourceFile:
        """Name, size, time and digest, which other content would not have; reads everything."""

    def same_as(self, kept: SourceFile) -> bool | None:
        """True if this is `kept`, by sizes and times; None where only the content can tell."""


def open_sources(paths: Sequence[Path], image_size: int | None) -> list[PackSource]:
    """The sources at `paths`, in their order; a folder of .npz or .pickle parts is all of its parts, by name.

    image_size: square that files of an image folder are resized to.

    Raises: UserError for a path that is none of the known forms, and for parts that do not fit together.
    """
    sources = [_open(path, image_size) for path in _expanded(paths)]
    first = sources[0]
    for source in sources[1:]:
        for name in ("shape", "labelled", "class_names"):
            ours, theirs = getattr(source, name), getattr(first, name)
            if ours != theirs:
                raise UserError(
                    f"{source.path} does not belong to {first.path}: its {name} is {ours}, not {theirs}; "
                    "pack them separately"
                )
    return sources


def _expanded(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        parts = sorted(_parts(path), key=_natural) if path.is_dir() else []
        yield from parts or [path]


def _parts(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if p.suffix.lower() in (".npz", *PICKLES) and not p.is_dir()]


def _natural(path: Path) -> list[tuple[int, str]]:
    """A key under which part2 comes before part10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _open(path: Path, image_size: int | None) -> PackSource:
    if path.is_dir():
        return FolderSource(path, image_size)
    regular_file(path)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return NpzSource(path)
    if suffix in PICKLES:
        return PickleSource(path)
    raise UserError(
        f"{path} is not extra data: give an .npz file with image and label, a .pickle with data and "
        "extrapolated_targets, a folder of class folders, or a store of fastdynat pack"
    )


def source_file(path: Path) -> SourceFile:
    """The facts about the file at `path`; reads all of it."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        while data := file.read(DIGEST_BYTES):
            digest.update(data)
        about = os.fstat(file.fileno())
    return SourceFile(
        name=path.name, size=about.st_size, mtime_ns=about.st_mtime_ns, sha256=digest.hexdigest()
    )


@dataclass(frozen=True)
class _Header:
    """Type and shape of a stored array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


class ArraySource(ABC):
    """Base of the files of two arrays: images, uint8 (N, H, W, C) or (N, H, W), and labels, integers (N,)."""

    keys: tuple[str, str]
    class_names: tuple[str, ...] | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._failures():
            self._headers = self._read_headers()
        image, label = self.keys
        if image not in self._headers:
            found = ", ".join(sorted(self._headers)) or "nothing"
            raise UserError(
                f"{path} has no array {image!r}; it has {found}, and must have {image} and {label}"
            )
        self.labelled = label in self._headers
        self.count, self.shape = self._checked_images(self._headers[image])
        if self.labelled:
            self._check_labels(self._headers[label])

    @abstractmethod
    def _read_headers(self) -> dict[str, _Header]:
        """Headers of all arrays in the file, by key."""

    @abstractmethod
    def _opened(self, key: str) -> Any:
        """A context manager: a function that reads the next bytes of the array called `key`."""

    def about(self) -> SourceFile:
        return source_file(self.path)

    def same_as(self, kept: SourceFile) -> bool | None:
        about = self.path.stat()
        return False if about.st_size != kept.size else about.st_mtime_ns == kept.mtime_ns or None

    def chunks(self, size: int) -> Iterator[Chunk]:
        image, label = self.keys
        with self._failures(), ExitStack() as stack:
            pixels: Read = stack.enter_context(self._opened(image))
            labels: Read | None = stack.enter_context(self._opened(label)) if self.labelled else None
            for start in range(0, self.count, size):
                number = min(size, self.count - start)
                rows = self._take(pixels, image, number)
                images = np.ascontiguousarray(rows.transpose(0, 3, 1, 2)) if rows.ndim == 4 else rows[:, None]
                found = None if labels is None else self._labels(self._take(labels, label, number), start)
                yield images, found
            if pixels(1) or (labels is not None and labels(1)):  # at their end the sums of a zip are compared
                raise UserError(f"{self.path} is damaged: it has more bytes than its arrays")

    def _take(self, read: Read, key: str, number: int) -> np.ndarray:
        header = self._headers[key]
        needed = number * int(np.prod(header.shape[1:], dtype=np.int64)) * header.dtype.itemsize
        data = read(needed)
        if len(data) != needed:
            raise UserError(f"{self.path} is damaged: the array {key} is truncated")
        return np.frombuffer(data, dtype=header.dtype).reshape(number, *header.shape[1:])

    def _labels(self, labels: np.ndarray, start: int) -> np.ndarray:
        bad = np.flatnonzero((labels < 0) | (labels > MOST_LABEL))
        if len(bad):
            raise UserError(
                f"{self.path}: label {labels[bad[0]]} at index {start + bad[0]} is outside "
                f"[0, {MOST_LABEL}]; number the classes from 0"
            )
        return labels.astype(np.int32)

    def _checked_images(self, header: _Header) -> tuple[int, tuple[int, int, int]]:
        key, shape = self.keys[0], header.shape
        if header.dtype != np.uint8 or len(shape) not in (3, 4) or header.fortran:
            order = ", column by column" if header.fortran else ""
            raise UserError(
                f"{self.path}: {key} must be uint8 (N, H, W, C), got {header}{order}; "
                "convert the images to 0..255, channels last"
            )
        if len(shape) == 4 and shape[3] not in (1, 3):
            first = ", channels first" if shape[1] in (1, 3) else ""
            raise UserError(
                f"{self.path}: {key} must be (N, H, W, C) with 1 or 3 channels, got {shape}{first}; "
                "store images.transpose(0, 2, 3, 1)"
            )
        if 0 in shape:
            raise UserError(f"{self.path}: {key} is {shape}, which is not an image")
        return shape[0], (shape[3] if len(shape) == 4 else 1, shape[1], shape[2])

    def _check_labels(self, header: _Header) -> None:
        if header.dtype.kind not in "iu" or header.shape != (self.count,):
            raise UserError(
                f"{self.path}: {self.keys[1]} must be whole numbers ({self.count},), one for each image, got "
                f"{header}"
            )

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn what libraries raise for a damaged file into a UserError."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # zip, zlib and numpy fail in many ways
            reason = " ".join(str(error).split())[:100] or type(error).__name__
            raise UserError(f"{self.path} is damaged, or not a {self.path.suffix} file: {reason}") from None


class NpzSource(ArraySource):
    """An .npz file of DM-Improves-AT or DeepMind, compressed or not."""

    keys = KEYS[".npz"]

    def _read_headers(self) -> dict[str, _Header]:
        with open_file(self.path) as file, zipfile.ZipFile(file) as archive:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            found = {}
            for name in names:
                with archive.open(name) as member:
                    found[name.removesuffix(".npy")] = _read_header(member)
            return found

    @contextmanager
    def _opened(self, key: str) -> Iterator[Read]:
        with (
            open_file(self.path) as file,
            zipfile.ZipFile(file) as archive,
            archive.open(f"{key}.npy") as member,
        ):
            _read_header(member)
            yield member.read


def _read_header(file: IO[bytes]) -> _Header:
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"an array of format {version}")
    shape, fortran, dtype = readers[version](file)
    return _Header(shape, dtype, fortran and len(shape) > 1)


class PickleSource(ArraySource):
    """The pickle of Carmon et al. 2019: images and the labels that a network gave them."""

    keys = KEYS[".pickle"]

    @cached_property
    def _arrays(self) -> dict[str, PickledArray]:
        found = read_array_pickle(self.path)
        return {key: value for key, value in found.items() if isinstance(value, PickledArray)}

    def _read_headers(self) -> dict[str, _Header]:
        return {
            key: _Header(array.shape, array.dtype, array.fortran and len(array.shape) > 1)
            for key, array in self._arrays.items()
        }

    def _opened(self, key: str) -> Any:
        return self._arrays[key].opened()


class FolderSource:
    """A folder of class folders, or of images without classes.

    A label is the place of its class folder in alphabetical order. What it means in a dataset is settled by
    the folder's name when a run begins.

    Raises: UserError as `imagefolder.list_files`, and for a first image that cannot be decoded.
    """

    def __init__(self, path: Path, image_size: int | None) -> None:
        self.path, self._image_size = path, image_size
        inside = [entry for entry in sorted(path.iterdir()) if not entry.name.startswith(".")]
        images = [entry for entry in inside if entry.suffix.lower() in SUFFIXES and entry.is_file()]
        self.labelled = not (images and not any(entry.is_dir() for entry in inside))
        self.class_names: tuple[str, ...] | None = None
        if self.labelled:
            files = list_files(path)
            self._paths, self._labels = files.paths, files.labels.numpy()
            self.class_names = files.class_names
        else:
            self._paths, self._labels = tuple(images), np.zeros(0, dtype=np.int64)
        self.count = len(self._paths)
        shape = read_rgb(self._paths[0], image_size).shape
        self.shape = (shape[0], shape[1], shape[2])

    def chunks(self, size: int) -> Iterator[Chunk]:
        names = np.array([os.fsencode(path) for path in self._paths])
        files = FileSet(names, torch.zeros(self.count, dtype=torch.int64), self.shape, self._image_size)
        start = 0
        for part in read_in_order(files, size, self.count):
            stop = start + len(part)
            yield part.numpy(), self._labels[start:stop].astype(np.int32) if self.labelled else None
            start = stop

    def about(self) -> SourceFile:
        digest, newest = hashlib.sha256(), 0
        for name, path in self._named():
            with open_file(path) as file:
                digest.update(b"%b\0" % name + hashlib.sha256(file.read()).digest())
            newest = max(newest, path.stat().st_mtime_ns)
        size, times = self._size_and_times()
        return SourceFile(
            name=self.path.name, size=size, mtime_ns=newest, sha256=digest.hexdigest(), times=times
        )

    def same_as(self, kept: SourceFile) -> bool | None:
        size, times = self._size_and_times()
        return False if size != kept.size else times == kept.times or None

    def _named(self) -> Iterator[tuple[bytes, Path]]:
        return ((os.fsencode(path.relative_to(self.path)), path) for path in self._paths)

    def _size_and_times(self) -> tuple[int, str]:
        """Bytes of all files, and `SourceFile.times`."""
        digest, total = hashlib.sha256(), 0
        for name, path in self._named():
            about = path.stat()
            total += about.st_size
            digest.update(b"%b\0%d\0%d\0" % (name, about.st_size, about.st_mtime_ns))
        return total, digest.hexdigest()
