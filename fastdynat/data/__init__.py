"""Image data: named data sets, held-out splits, and loaders that turn stored uint8 images into batches in [0, 1]."""

from fastdynat.data.loader import Batch, ResidentLoader, TrainLoader, eval_batches
from fastdynat.data.sources import dataset_info, known_datasets, load_test, load_train
from fastdynat.data.store import DatasetInfo, ImageSet, Splits, check_labels

__all__ = [
    "Batch",
    "DatasetInfo",
    "ImageSet",
    "ResidentLoader",
    "Splits",
    "TrainLoader",
    "check_labels",
    "dataset_info",
    "eval_batches",
    "known_datasets",
    "load_test",
    "load_train",
]
