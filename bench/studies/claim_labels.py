"""Quality of the labels that a guide makes: agreement with the true ones, entropy, calibration."""

import copy
from pathlib import Path

import numpy as np
import torch
from claim_statistics import calibration_error, entropy
from torch import Tensor, nn

from fastdynat import load_network
from fastdynat.data import Images, load_test
from fastdynat.methods.configs import stored_config
from fastdynat.runs import find_checkpoint
from fastdynat.training.parts import open_split


def has_guide(run: Path) -> bool:
    """True if the run's last checkpoint has a guide."""
    folder = find_checkpoint(run, "last")
    return folder is not None and (folder / "guide.safetensors").exists()


def label_quality(run: Path) -> dict[str, dict[str, dict[str, float]]]:
    """By checkpoint and images (train, test): agreement and ece in [0, 1], entropy in nats.

    As in training, the guide sees batches in train mode; unlike there, the images are not augmented and all
    labels come from the same weights.
    """
    config = stored_config(run)
    data = config.data
    split = open_split(config)
    sets = {"train": split.train_images(), "test": load_test(data.data, data.data_dir)[1]}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for role in ("best", "last"):
        folder = find_checkpoint(run, role)
        assert folder is not None
        guide, _ = load_network(folder / "guide.safetensors")
        found[role] = {
            name: quality(guide, images, config.data.batch_size or 128) for name, images in sets.items()
        }
    return found


def quality(guide: nn.Module, images: Images, batch_size: int) -> dict[str, float]:
    """Agreement, entropy and calibration error of the labels of `images`, which the guide sees in batches."""
    # Neighbours in the set are of one class, which batch statistics would betray: mix them.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    order = order[: max(len(order) // batch_size, 1) * batch_size]
    network, parts = copy.deepcopy(guide).train(), []
    with torch.no_grad():
        for rows in order.split(batch_size):
            parts.append(network(images.read(rows).float() / 255).softmax(1))
    probs = torch.cat(parts).double().numpy()
    labels = as_array(images.labels[order])
    return {
        "agreement": float((probs.argmax(1) == labels).mean()),
        "entropy": entropy(probs),
        "ece": calibration_error(probs, labels),
    }


def as_array(labels: Tensor) -> np.ndarray:
    """As NumPy has them."""
    array: np.ndarray = labels.numpy()
    return array
