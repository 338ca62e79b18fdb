"""Stores of extra images: a folder that `fastdynat pack` writes, mapped into memory and read in place.

images.npy      uint8 (M, C, H, W)
labels.npy      int32 (M,), where the images are labelled
checksums.npy   uint32, the CRC-32 of each `chunk` images
store.json      shape, classes, checksum and sources
"""

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdynat.data.image_sets import resize_square
from fastdynat.documents import read_json
from fastdynat.documents.numbers import Count
from fastdynat.errors import UserError

FORMAT = "fastdynat-images/1"
STORE, IMAGES, LABELS, CHECKSUMS = "store.json", "images.npy", "labels.npy", "checksums.npy"
HASHED = 2**20  # labels that are in memory at a time
SAMPLED = 8  # chunks whose pixels are compared with their checksum when a store is opened


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file or folder that a store was packed from.

    Attributes:
        size: bytes of the file, or of the folder's files together.
        mtime_ns: time of the last change, of a folder that of the newest file.
        sha256: of the content, of a folder with the names of its files.
        times: of a folder, the sha256 of names, sizes and times of its files; while they are the same, its
            content is not read again.
    """

    name: str
    size: int
    mtime_ns: int
    sha256: str
    times: str = ""


@dataclass(frozen=True, kw_only=True)
class StoreFacts:
    """Content of store.json.

    Attributes:
        count: images.
        shape: (C, H, W).
        classes: the largest label plus 1; None for images without labels.
        class_names: names of the class folders that the labels number; None where the source has none.
        image_size: square that the images were resized to; None if they were not.
        chunk: images of each checksum.
        checksum: see `total_checksum`.
    """

    format: str
    count: Count
    shape: tuple[int, int, int]
    classes: Count | None
    class_names: tuple[str, ...] | None
    image_size: int | None
    chunk: Count
    checksum: str
    sources: tuple[SourceFile, ...]


def is_store(folder: Path) -> bool:
    """True for a folder with a finished store."""
    return (folder / STORE).is_file()


def total_checksum(shape: tuple[int, ...], chunks: np.ndarray, labels: np.ndarray | None) -> str:
    """16 hexadecimal digits that images of another shape, pixels or labels would not have.

    chunks: uint32, the CRC-32 of the pixels of each chunk.
    """
    digest = hashlib.sha256(repr(tuple(shape)).encode() + chunks.astype("<u4").tobytes())
    if labels is not None:
        for start in range(0, len(labels), HASHED):
            digest.update(np.ascontiguousarray(labels[start : start + HASHED], dtype="<i4").data)
    return digest.hexdigest()[:16]


class ExtraStore:
    """The store in a folder.

    Attributes:
        folder: its absolute path.
        facts: the content of store.json.
        labels: int32 (M,), mapped into memory; None for images without labels.

    Raises: UserError where the folder is no finished store, or its files are not those that were written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.facts = read_json(
            folder / STORE,
            StoreFacts,
            what="a store of fastdynat pack",
            format=FORMAT,
            remedy="pack the images again",
        )
        count, shape = self.facts.count, self.facts.shape
        self._images = self._mapped(IMAGES, np.dtype(np.uint8), (count, *shape))
        labelled = self.facts.classes is not None
        self.labels = self._mapped(LABELS, np.dtype(np.int32), (count,)) if labelled else None
        chunks = -(-count // max(self.facts.chunk, 1))
        self._chunks = self._mapped(CHECKSUMS, np.dtype(np.uint32), (chunks,))
        if total_checksum((count, *shape), self._chunks, self.labels) != self.facts.checksum:
            raise self._damaged(LABELS if labelled else CHECKSUMS)
        for number in sorted({round(at) for at in np.linspace(0, chunks - 1, SAMPLED)}):
            self._verify(number)

    def __len__(self) -> int:
        return self.facts.count

    def read(self, indices: Tensor) -> Tensor:
        """The images at int64 `indices`, uint8 (n, C, H, W), copied from the file."""
        return torch.from_numpy(self._images[indices.numpy()])

    def verify(self) -> Iterator[int]:
        """Compare all pixels with their checksums; yields the number of images of each chunk.

        Raises: UserError naming the first images that are damaged.
        """
        for number in range(len(self._chunks)):
            yield self._verify(number)

    def _verify(self, number: int) -> int:
        start = number * self.facts.chunk
        pixels = self._images[start : start + self.facts.chunk]
        if zlib.crc32(pixels.data) != int(self._chunks[number]):
            raise self._damaged(f"{IMAGES} from image {start} on")
        return len(pixels)

    def _mapped(self, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        try:
            found = np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
        except Exception:  # a damaged header fails in any way
            raise self._damaged(name) from None
        if found.dtype != dtype or found.shape != shape:
            raise self._damaged(name)
        return found

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.folder}: {what} is damaged or was changed; pack the images again")


def resized(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Images, uint8 (n, C, H, W), of `shape`: resized to that square where they are not of it."""
    return images if images.shape[1:] == shape else resize_square(images, shape[1])


@dataclass(frozen=True, eq=False)
class ExtraSet:
    """A store's images as one run sees them.

    Attributes:
        labels: whole numbers (M,), possibly mapped into memory; in [0, classes), or UNLABELLED.
        shape: (C, H, W) of the images that are read; a square, resized to, where it is not the store's.
        label_file: .npy file of the labels, where they are not the store's.
    """

    store: ExtraStore
    labels: np.ndarray
    shape: tuple[int, int, int]
    label_file: Path | None = None

    def __len__(self) -> int:
        return len(self.store)

    def read(self, indices: Tensor) -> Tensor:
        """The images at int64 `indices`, uint8 (n, C, H, W) on the CPU."""
        return resized(self.store.read(indices), self.shape)

    def labels_at(self, indices: Tensor) -> Tensor:
        """Labels of the images at `indices`, int64 (n,)."""
        return torch.from_numpy(self.labels[indices.numpy()].astype(np.int64))

    @cached_property
    def checksum(self) -> str:
        """Checksum of pixels, shape and labels; the store's own where the run uses its labels as they are."""
        if self.labels is self.store.labels and self.shape == self.store.facts.shape:
            return self.store.facts.checksum
        about = f"{self.store.facts.checksum} {self.shape}".encode()
        return hashlib.sha256(about + self.labels.astype("<i4").tobytes()).hexdigest()[:16]
