"""The training split of a data set, read into memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdynat.data import DatasetInfo, ImageSet, open_train


@dataclass(frozen=True)
class Splits:
    """Training images and the validation images held out of the same training split."""

    info: DatasetInfo
    train: ImageSet
    val: ImageSet


def load_train(name: str, data_dir: str | Path | None, **options: Any) -> Splits:
    """`open_train` with the images of both parts read."""
    split = open_train(name, data_dir, **options)
    return Splits(split.info, split.train_images(), split.val_images())
