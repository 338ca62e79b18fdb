"""Data sets by name: train and val images from the training split, test images from the test split."""

import logging
import math
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdynat.config.train_checks import DATASETS
from fastdynat.data import digits, torchvision_sets
from fastdynat.data.extra_store import ExtraSet
from fastdynat.data.hugging_face import open_hugging_face
from fastdynat.data.image_sets import (
    UNLABELLED,
    DatasetInfo,
    Images,
    ImageSet,
    ImageSource,
    StreamedSource,
    check_label_values,
    resize_square,
)
from fastdynat.data.imagefolder import open_imagefolder
from fastdynat.data.own_data import OwnData, own_data
from fastdynat.data.split import stratified_split
from fastdynat.errors import UserError, unknown_name
from fastdynat.machine.free_memory import own_memory
from fastdynat.user_code import is_hub_data, is_user_code, is_user_supplied

logger = logging.getLogger(__name__)

KNOWN = DATASETS
# Of a memory, for images as uint8 that stay in it: the rest is for weights, activations and other programs.
RESIDENT_SHARE = 0.25
KEPT_BYTES = 2**30  # of validation or test images in files: more of them are read anew by each measurement


def known_datasets() -> list[str]:
    """Return the names that `open_train` and `load_test` take."""
    return list(KNOWN)


def dataset_info(name: str) -> DatasetInfo | None:
    """Return what is known without reading data; None for image folders, ``hf:`` and data of the user.

    Raises: UserError for an unknown name.
    """
    if is_user_supplied(name) or is_hub_data(name):
        return None
    if name not in KNOWN:
        raise unknown_name("dataset", name, KNOWN)
    if name == "imagefolder":
        return None
    return digits.INFO if name == "digits" else torchvision_sets.INFOS[name]


@dataclass(frozen=True)
class TrainSplit:
    """A training split that is cut but not read: int64 indices of the training and of the validation images.

    unlabelled: (number of training images,) bool, those whose label training is not told; None tells all.
    extra: images beside the training images, not counted among them; None where there are none.
    """

    info: DatasetInfo
    source: ImageSource
    train: Tensor
    val: Tensor
    unlabelled: Tensor | None = None
    extra: ExtraSet | None = None

    @property
    def in_files(self) -> bool:
        """True for images in files, which a loader can read itself: `train_files`."""
        return isinstance(self.source, StreamedSource)

    @property
    def num_bytes(self) -> int:
        """Bytes that the training images and the extra ones take as uint8."""
        extra = 0 if self.extra is None else len(self.extra)
        return (len(self.train) + extra) * math.prod(self.info.image_shape)

    def train_images(self) -> ImageSet:
        """Read the training images."""
        images = self.source.take(self.train, self.info)
        return replace(images, labels=self._shown(images.labels))

    def train_files(self) -> Images:
        """The training images in their files, none of them read; only where they are `in_files`."""
        assert isinstance(self.source, StreamedSource)
        files: Any = self.source.files(self.train)
        return replace(files, labels=self._shown(files.labels))

    def _shown(self, labels: Tensor) -> Tensor:
        return labels if self.unlabelled is None else labels.masked_fill(self.unlabelled, UNLABELLED)

    def val_images(self) -> Images:
        """The validation images, in memory where they are few (`keeps`)."""
        return _kept_or_streamed(self.source, self.val, self.info, "validation")


class ReadOnceSplit(TrainSplit):
    """A split whose training images are read once, for however many callers."""

    @classmethod
    def of(cls, split: TrainSplit) -> "ReadOnceSplit":
        """`split`, read at the first call of `train_images`."""
        return cls(**{field.name: getattr(split, field.name) for field in fields(split)})

    @cached_property
    def _images(self) -> ImageSet:
        return super().train_images()

    def train_images(self) -> ImageSet:
        return self._images


def keeps(num_bytes: int) -> bool:
    """True for images in files that are few enough to be decoded once, for all measurements.

    Their pixels take at most 1 GiB, and at most a quarter of the memory available to this process.
    """
    memory = own_memory()
    return num_bytes <= KEPT_BYTES and (memory is None or num_bytes <= RESIDENT_SHARE * memory)


def _kept_or_streamed(source: ImageSource, rows: Tensor, info: DatasetInfo, what: str) -> Images:
    num_bytes = len(rows) * math.prod(info.image_shape)
    if not isinstance(source, StreamedSource):
        return source.take(rows, info)
    files = source.files(rows)
    if keeps(num_bytes):
        # Free memory decides, and may decide otherwise for another process: both have the same checksum.
        return replace(source.take(rows, info), origin=files)
    logger.info(
        "%s %s images of %s stay in their files and are decoded batch by batch: they would take %.2f GiB",
        f"{len(rows):,}",
        what,
        info.name,
        num_bytes / 2**30,
    )
    return files


def open_train(
    name: str,
    data_dir: str | Path | None,
    *,
    val_size: int | float | None,
    seed: int,
    image_size: int | None = None,
    download: bool = True,
    limit: int | None = None,
    labelled: int | None = None,
) -> TrainSplit:
    """Open the training split and hold validation images out; of the test set only image files are surveyed.

    Args:
        name: One of `known_datasets()`, ``hf:NAME_OR_FOLDER``, or data of the user (`own_data`).
        data_dir: Folder of the data; digits needs none.
        val_size: Validation images as a number, or as a share if a float in (0, 1); 0 gives an empty set;
            None 1,000 images, or 10 % of fewer than 10,000.
        seed: Decides which images are held out (and which are kept under `limit`), class by class.
        image_size: Resize all images to this square.
        download: Allow torchvision to fetch missing data.
        limit: Keep at most this many training images, in proportion to the classes.
        labelled: Let this many of them keep their label, in proportion to the classes; the others are
            UNLABELLED.

    Raises: UserError for unknown names, missing or broken data, bad labels, or a val_size or limit that
        leaves a class without a training image.
    """
    own = _own(name, image_size)
    if own is not None and own.test is None and is_user_code(name):
        logger.info(
            "%s has no test images, so fastdynat eval cannot attack this run; to evaluate it, return a dict "
            "with "
            "train and test from the file now: a run keeps to the file that it began with",
            own.info.name,
        )
    if own is not None and own.val is not None:
        return _with_own_validation(own, val_size=val_size, seed=seed, limit=limit, labelled=labelled)
    info, source = (
        _open(name, data_dir, "train", image_size=image_size, download=download)
        if own is None
        else (own.info, ImageSource(own.train.labels, own.train.read))
    )
    check_label_values(source.labels, info.num_classes, name)
    train, val = stratified_split(source.labels, val_size=val_size, limit=limit, seed=seed)
    return TrainSplit(
        info, source, train, val, None if labelled is None else _hide(source.labels[train], labelled, seed)
    )


def _own(name: str, image_size: int | None) -> OwnData | None:
    """The user's data called `name`; None where the name is one of `known_datasets`."""
    if not is_user_supplied(name):
        return None
    own = own_data(name)
    if image_size not in (None, *own.info.image_shape[1:]):
        raise UserError(
            f"image_size {image_size}: images of your own data are not resized; resize them in your own code"
        )
    return own


def _with_own_validation(
    own: OwnData, *, val_size: int | float | None, seed: int, limit: int | None, labelled: int | None
) -> TrainSplit:
    """A split whose validation images the user has chosen."""
    assert own.val is not None
    if val_size is not None:
        raise UserError(
            f"val_size {val_size:g}: {own.info.name} has its own validation images; leave val_size out"
        )
    train, _ = stratified_split(own.train.labels, val_size=0, limit=limit, seed=seed)
    images = ImageSet(
        torch.cat([own.train.images, own.val.images]), torch.cat([own.train.labels, own.val.labels])
    )
    val = torch.arange(len(own.train), len(images))
    hidden = None if labelled is None else _hide(own.train.labels[train], labelled, seed)
    return TrainSplit(own.info, ImageSource(images.labels, images.read), train, val, hidden)


def _hide(labels: Tensor, labelled: int, seed: int) -> Tensor:
    """(N,) bool: the images whose label is not shown."""
    if not 0 < labelled < len(labels):
        raise UserError(
            f"labelled {labelled}: of {len(labels)} training images between 1 and {len(labels) - 1} can keep "
            "their label while others are unlabelled; leave --labelled out to use all labels"
        )
    classes = int(labels.unique().numel())
    if labelled < classes:
        raise UserError(
            f"labelled {labelled} is less than one label for each of the {classes} classes; use more"
        )
    kept, _ = stratified_split(labels, val_size=0, limit=labelled, seed=seed)
    return torch.ones(len(labels), dtype=torch.bool).index_fill_(0, kept, False)


def load_test(
    name: str,
    data_dir: str | Path | None,
    *,
    image_size: int | None = None,
    download: bool = True,
) -> tuple[DatasetInfo, Images]:
    """Open the whole test split. The facts that come with it are those that `open_train` gives.

    The images are in memory (`ImageSet`), but for many that lie in files (`keeps`): those are read when they
    are needed.

    Raises: UserError as `open_train`.
    """
    own = _own(name, image_size)
    if own is not None:
        if own.test is None:
            raise UserError(
                f"{own.info.name} has no test images; return a dict with train and test, or (train, test)"
            )
        return own.info, own.test
    info, source = _open(name, data_dir, "test", image_size=image_size, download=download)
    check_label_values(source.labels, info.num_classes, name)
    return info, _kept_or_streamed(source, torch.arange(len(source.labels)), info, "test")


def _open(
    name: str, data_dir: str | Path | None, split: str, *, image_size: int | None, download: bool
) -> tuple[DatasetInfo, ImageSource]:
    if image_size is not None and image_size < 1:
        raise UserError(f"image size must be at least 1 pixel, got {image_size}")
    info = dataset_info(name)
    if is_hub_data(name):
        return open_hugging_face(name, split, image_size=image_size, download=download)
    if info is None:
        return open_imagefolder(data_dir, split, image_size=image_size)
    if image_size is not None:
        info = replace(info, image_shape=(info.image_shape[0], image_size, image_size))
    if name == "digits":
        source = digits.open_digits(split)
        return info, ImageSource(
            source.labels, lambda indices: resize_square(source.read(indices), info.image_shape[1])
        )
    return info, torchvision_sets.open_torchvision(
        name, data_dir, split, image_size=image_size, download=download
    )
