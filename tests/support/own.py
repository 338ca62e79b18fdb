"""A network and data of a user, small enough to be trained in seconds."""

import torch
from torch import Tensor, nn

from fastdynat.data import load_test, open_train

FILE = """
import torch
from torch import nn

from fastdynat.data import load_test, open_train


def make_net(num_classes):
    layers = [nn.AvgPool2d(4), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, num_classes)]
    return nn.Sequential(*layers)


def make_data():
    train = open_train("digits", None, val_size=0, seed=0, limit=640).train_images()
    test = load_test("digits", None)[1]
    return {"train": (train.images, train.labels), "test": (test.images[:100], test.labels[:100])}
"""


def own_net(classes: int = 10, seed: int = 0) -> nn.Module:
    """Two layers on digits averaged to 8x8."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, classes))


def own_tensors(count: int = 640) -> tuple[Tensor, Tensor]:
    """uint8 images (N, 1, 32, 32) and labels (N,)."""
    found = open_train("digits", None, val_size=0, seed=0, limit=count).train_images()
    return found.images, found.labels


def own_test(count: int = 100) -> tuple[Tensor, Tensor]:
    """Test images and labels like those of `own_tensors`."""
    found = load_test("digits", None)[1]
    return found.images[:count], found.labels[:count]
