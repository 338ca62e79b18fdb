"""Sets of uint8 images with their labels, and the facts about a data set."""

import functools
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdynat.errors import UserError

CONVERT_CHUNK = 1024  # images in float at one time while resizing; bounds the extra memory


class Images(Protocol):
    """A set of images with labels: in memory (`ImageSet`), or in files and decoded when they are read."""

    @property
    def labels(self) -> Tensor:
        """int64 (N,) on the CPU."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""

    def __len__(self) -> int:
        """Number of images."""

    def read(self, indices: Tensor) -> Tensor:
        """Return the images at int64 `indices`, uint8 (n, C, H, W) on the CPU."""

    def part(self, rows: slice | Tensor) -> "Images":
        """The set of the images at `rows`, a slice or int64 indices; files are not read for it."""

    def checksum(self) -> int:
        """Return a number that other data would not have; of files it covers sizes, not content."""

    def content(self) -> int:
        """The CRC-32 of a sample of the files (`sampled_content`); 0 where `checksum` covers all pixels."""


SAMPLED = 64  # encoded images whose bytes are read, spread over the set


def sampled_content(encoded: Callable[[int], bytes], count: int) -> int:
    """The CRC-32 of up to `SAMPLED` of `count` encoded images, always the same ones.

    encoded: the bytes of image number n.
    """
    total = 0
    for number in range(min(count, SAMPLED)):
        total = zlib.crc32(encoded(number * count // min(count, SAMPLED)), total)
    return total


UNLABELLED = -1  # the label of an image whose class training is not told


@dataclass(frozen=True)
class ImageSet:
    """Resident images, uint8 (N, C, H, W) on the CPU, and labels, int64 (N,).

    origin: the same images in files, whose checksum is also this set's; None where they are of no account.
    """

    images: Tensor
    labels: Tensor
    origin: Images | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.images.shape
        return (channels, height, width)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Tensor) -> Tensor:
        return self.images[indices]

    def part(self, rows: slice | Tensor) -> "ImageSet":
        origin = None if self.origin is None else self.origin.part(rows)
        return ImageSet(self.images[rows], self.labels[rows], origin)

    def checksum(self) -> int:
        if self.origin is not None:
            return self.origin.checksum()
        return zlib.crc32(
            self.images.contiguous().numpy().data, zlib.crc32(self.labels.contiguous().numpy().data)
        )

    def content(self) -> int:
        return 0 if self.origin is None else self.origin.content()


@dataclass(frozen=True)
class DatasetInfo:
    """Facts about a data set.

    image_shape is (C, H, W). mean and std are per channel in [0, 1] units, of the training images. augment is
    the augmentation that suits the data: "crop-flip", "crop" (where mirrored images change meaning) or
    "none". test_origin is that of test images which code of the user has made: a digest of the code, and the
    `set_digest` of the images; None for other data.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str
    test_origin: tuple[str, str] | None = None


@dataclass(frozen=True)
class ImageSource:
    """One split before it is cut: labels, int64 (N,), and a reader of the images at given int64 indices."""

    labels: Tensor
    read: Callable[[Tensor], Tensor]

    def take(self, indices: Tensor, info: DatasetInfo) -> ImageSet:
        """Read the images at `indices` and check them against `info`."""
        images = (
            self.read(indices) if len(indices) else torch.empty((0, *info.image_shape), dtype=torch.uint8)
        )
        chosen = ImageSet(images, self.labels[indices])
        check_image_set(chosen, info.num_classes, info.name)
        return chosen


@dataclass(frozen=True)
class StreamedSource(ImageSource):
    """A split in files: besides being read at once, it can be read as it is needed.

    files: the images at int64 indices, none of them read.
    """

    files: Callable[[Tensor], Images]


def check_image_set(data: ImageSet, num_classes: int, name: str) -> None:
    """Check dtypes and shapes of a set and that every label is in [0, num_classes).

    Raises: UserError naming the data set, the value and the index of the first bad label.
    """
    images, labels = data.images, data.labels
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise UserError(
            f"{name}: images must be uint8 of shape (N, C, H, W), got {_dtype(images)} "
            f"{tuple(images.shape)}; convert them to 0..255"
        )
    if labels.dtype != torch.int64 or labels.shape != (len(images),):
        raise UserError(
            f"{name}: labels must be int64 of shape ({len(images)},), one per image, got {_dtype(labels)} "
            f"{tuple(labels.shape)}"
        )
    check_label_values(labels, num_classes, name)


def check_label_values(labels: Tensor, num_classes: int, name: str) -> None:
    """Check that every label, int64 (N,), is in [0, num_classes).

    Raises: UserError naming the data set, the value and the index of the first bad label.
    """
    bad = ((labels < 0) | (labels >= num_classes)).nonzero().flatten()
    if len(bad):
        index = int(bad[0])
        raise UserError(
            f"{name}: label {int(labels[index])} at index {index} is outside [0, {num_classes}); "
            f"number the {num_classes} classes from 0"
        )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def resize_square(images: Tensor, image_size: int) -> Tensor:
    """Resize uint8 (N, C, H, W) to (N, C, image_size, image_size): fit the shorter side, crop the centre."""
    height, width = images.shape[-2:]
    if (height, width) == (image_size, image_size):
        return images
    scale = image_size / min(height, width)
    new_size = (max(image_size, round(height * scale)), max(image_size, round(width * scale)))
    top, left = (new_size[0] - image_size) // 2, (new_size[1] - image_size) // 2
    out = torch.empty((*images.shape[:2], image_size, image_size), dtype=torch.uint8)
    for start in range(0, len(images), CONVERT_CHUNK):
        chunk = images[start : start + CONVERT_CHUNK].float()
        chunk = F.interpolate(chunk, size=new_size, mode="bilinear", align_corners=False, antialias=True)
        chunk = chunk[..., top : top + image_size, left : left + image_size]
        out[start : start + CONVERT_CHUNK] = chunk.round().clamp(0, 255).to(torch.uint8)
    return out


def channel_stats(batches: Iterable[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the per-channel mean and standard deviation, in [0, 1] units, of uint8 images (n, C, H, W).

    Exact up to the last division. A constant channel gets standard deviation 1/255, so that dividing by it
    stays finite.
    """
    counts = functools.reduce(torch.add, map(_value_counts, batches)).double()
    values = torch.arange(256, dtype=torch.float64) / 255
    shares = counts / counts.sum(1, keepdim=True)
    mean = shares @ values
    std = (shares * (values - mean[:, None]).square()).sum(1).sqrt().clamp_min(1 / 255)
    return tuple(mean.tolist()), tuple(std.tolist())


def _value_counts(images: Tensor) -> Tensor:
    """int64 (C, 256): how often each value occurs in each channel."""
    channels = images.transpose(0, 1).flatten(1)
    return torch.stack([torch.bincount(channel, minlength=256) for channel in channels])
