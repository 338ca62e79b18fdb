"""Image data: named data sets, held-out splits, and loaders of uint8 images as batches in [0, 1]."""

from fastdynat.data.batches import Batch, TrainLoader, eval_batches
from fastdynat.data.image_sets import UNLABELLED, DatasetInfo, Images, ImageSet, check_image_set
from fastdynat.data.loader_choice import check_dali, choose_loader, dali_problem, default_workers, make_loader
from fastdynat.data.resident_loader import ResidentLoader
from fastdynat.data.sources import TrainSplit, dataset_info, known_datasets, load_test, open_train
from fastdynat.data.torchvision_sets import RELEASED_PIXELS

__all__ = [
    "RELEASED_PIXELS",
    "UNLABELLED",
    "Batch",
    "DatasetInfo",
    "ImageSet",
    "Images",
    "ResidentLoader",
    "TrainLoader",
    "TrainSplit",
    "check_dali",
    "check_image_set",
    "choose_loader",
    "dali_problem",
    "dataset_info",
    "default_workers",
    "eval_batches",
    "known_datasets",
    "load_test",
    "make_loader",
    "open_train",
]
