"""CIFAR-10, CIFAR-100, SVHN and MNIST, downloaded and verified by torchvision."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.datasets as tv
from torch import Tensor

from fastdynat.data.image_sets import DatasetInfo, ImageSource, resize_square
from fastdynat.errors import UserError

CIFAR10_WORDS = "airplane automobile bird cat deer dog frog horse ship truck"
CIFAR100_WORDS = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark
shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
DIGITS = tuple("0123456789")

INFOS = {
    "cifar10": DatasetInfo(
        name="cifar10",
        num_classes=10,
        image_shape=(3, 32, 32),
        class_names=tuple(CIFAR10_WORDS.split()),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        augment="crop-flip",
    ),
    "cifar100": DatasetInfo(
        name="cifar100",
        num_classes=100,
        image_shape=(3, 32, 32),
        class_names=tuple(CIFAR100_WORDS.split()),
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        augment="crop-flip",
    ),
    "svhn": DatasetInfo(
        name="svhn",
        num_classes=10,
        image_shape=(3, 32, 32),
        class_names=DIGITS,
        mean=(0.4377, 0.4438, 0.4728),
        std=(0.1980, 0.2010, 0.1970),
        augment="crop",
    ),
    "mnist": DatasetInfo(
        name="mnist",
        num_classes=10,
        image_shape=(1, 28, 28),
        class_names=DIGITS,
        mean=(0.1307,),
        std=(0.3081,),
        augment="crop",
    ),
}
# (mean, standard deviation) in released code for adversarial training, where they are not the data's own. For
# folders, whatever the images, they are those of ImageNet.
RELEASED_PIXELS = {
    "cifar10": (INFOS["cifar10"].mean, (0.2471, 0.2435, 0.2616)),
    "imagefolder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
CLASSES = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "svhn": "SVHN", "mnist": "MNIST"}
HELD_AS = {
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
    "svhn": "train_32x32.mat and test_32x32.mat",
    "mnist": "MNIST/raw",
}


def open_torchvision(
    name: str, data_dir: str | Path | None, split: str, *, image_size: int | None, download: bool
) -> ImageSource:
    """Return the "train" or "test" split of one of `INFOS`, resized to a square if image_size is given.

    Raises: UserError where the data are missing or corrupt and cannot be downloaded.
    """
    if data_dir is None:
        raise UserError(f"data set {name!r} needs --data-dir DIR, the folder that holds {HELD_AS[name]}")
    try:
        images, labels = _read(name, data_dir, split, download)
    except Exception as error:  # the network, the file system, unpickling: all mean the same to the user
        reason = (str(error).splitlines() or [""])[0][:200]
        raise UserError(
            f"cannot load {name} from {str(data_dir)!r} ({type(error).__name__}: {reason}); "
            f"--data-dir DIR must point at the folder that holds {HELD_AS[name]}; "
            "for folders of JPEG or PNG files use --data imagefolder --data-dir DIR"
        ) from error
    if images.dtype == torch.uint8 and images.ndim == 4 and image_size is not None:
        images = resize_square(images, image_size)
    return ImageSource(labels, lambda indices: images[indices])


def _read(name: str, data_dir: str | Path, split: str, download: bool) -> tuple[Tensor, Tensor]:
    """Return uint8 images (N, C, H, W) and int64 labels (N,)."""
    make = getattr(tv, CLASSES[name])
    which: dict[str, Any] = {"split": split} if name == "svhn" else {"train": split == "train"}
    with warnings.catch_warnings():
        # NumPy 2.4 deprecates how dtypes were pickled in 2009, which is how the CIFAR files spell them.
        warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
        data = make(str(data_dir), download=download, **which)
    images = torch.as_tensor(data.data)
    if name == "mnist":
        images = images.unsqueeze(1)
    elif name != "svhn":
        images = images.permute(0, 3, 1, 2).contiguous()
    labels = data.labels if name == "svhn" else data.targets
    return images, torch.as_tensor(labels).to(torch.int64)
