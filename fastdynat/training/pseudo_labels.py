"""Pseudo-labels of extra images: predictions of a trained network, stored beside the images."""

import logging
import math
import os
from pathlib import Path

import numpy as np
import torch

from fastdynat.data import DatasetInfo
from fastdynat.data.extra_store import ExtraStore, resized
from fastdynat.errors import UserError, first_line
from fastdynat.evaluation.measure import exact_float32
from fastdynat.machine.cache_folder import user_cache
from fastdynat.ops.augment import to_unit
from fastdynat.runs import data_difference, guide_weights, load_network, read_sidecar
from fastdynat.runs.atomic_files import make_folder, replacing
from fastdynat.runs.manifest import sha256
from fastdynat.terminal.progress import ProgressDisplay

logger = logging.getLogger(__name__)

BATCH = 500
# Labels that have nothing to do with the class folders fit two orders differently by chance: by less than
# this and 2 / sqrt(images).
ORDER_MARGIN = 0.1


def label_file(
    store: ExtraStore, source: str, info: DatasetInfo, device: torch.device, display: ProgressDisplay
) -> Path:
    """The .npy file with labels of the images in `store` that --extra-labels `source` means.

    A file that `source` names itself is taken as it is. Of a run directory or a .safetensors file it is the
    clean prediction of that network for each image (the likeliest class, in float32); once computed it is
    found by the weights' sha256.

    Raises: UserError where there is no such network, or it was trained on other classes or shapes.
    """
    if source.endswith(".npy"):
        return Path(source).absolute()
    weights = guide_weights(Path(source))
    if difference := data_difference(read_sidecar(weights)[0], info):
        raise UserError(f"--extra-labels {source} was trained on {difference}; use a network for {info.name}")
    places = _places(store, f"labels-{sha256(weights)[:16]}-{'x'.join(map(str, info.image_shape))}.npy")
    for place in places:
        if place.is_file():
            return place
    network, _ = load_network(weights)
    out = next((place for place in places if os.access(place.parent, os.W_OK)), places[-1])
    make_folder(out.parent)
    logger.info("labelling %s extra images with %s, stored as %s", f"{len(store):,}", source, out)
    labels = _predictions(network.to(device), store, info.image_shape, device, display)
    with replacing(out, needed=labels.nbytes) as file, file.open("wb") as opened:
        np.save(opened, labels)
    return out


def read_labels(path: Path, store: ExtraStore, info: DatasetInfo) -> np.ndarray:
    """The labels in the .npy file at `path`, in memory: whole numbers (M,) in [0, num_classes).

    The file may be written again while a run uses them.

    Raises: UserError where they are something else, or in another order than the images of `store`.
    """
    count = len(store)
    try:
        labels = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header fails in any way
        raise UserError(f"--extra-labels {path} cannot be read as labels: {first_line(error)}") from None
    if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu" or labels.shape != (count,):
        got = f"{labels.dtype} {labels.shape}" if isinstance(labels, np.ndarray) else "several arrays"
        raise UserError(f"--extra-labels {path} must be whole numbers ({count},), one per image, got {got}")
    labels = np.array(labels)
    bad = np.flatnonzero((labels < 0) | (labels >= info.num_classes))
    if len(bad):
        raise UserError(
            f"--extra-labels {path}: label {labels[bad[0]]} at index {bad[0]} is outside "
            f"[0, {info.num_classes}), the classes of {info.name}"
        )
    labels = labels.astype(np.min_scalar_type(info.num_classes - 1))
    _check_order(path, labels, store)
    return labels


def _check_order(path: Path, labels: np.ndarray, store: ExtraStore) -> None:
    """Raise UserError for `labels` that fit the class folders of `store` one folder after the other, only."""
    folders = store.labels
    if store.facts.class_names is None or folders is None:
        return
    agreement = _purity(folders, labels)
    one_by_one = _purity(np.sort(folders), labels)
    if one_by_one > agreement + ORDER_MARGIN + 2 / math.sqrt(len(labels)):
        raise UserError(
            f"--extra-labels {path} has the order of torchvision's ImageFolder, one class folder after the "
            "other, but the images of a store take turns by class (the first of each folder, the second of "
            "each, ...): sort the labels so, or give the network instead, --extra-labels RUN"
        )


def _purity(folders: np.ndarray, labels: np.ndarray) -> float:
    """The share of images that have the most frequent label of their folder."""
    pairs, counts = np.unique((folders.astype(np.int64) << 32) + labels, return_counts=True)
    starts = np.flatnonzero(np.diff(pairs >> 32, prepend=-1))
    return float(np.maximum.reduceat(counts, starts).sum()) / len(labels)


def _places(store: ExtraStore, name: str) -> list[Path]:
    cache = user_cache("extra")
    return [store.folder / name, *([] if cache is None else [cache / f"{store.facts.checksum}-{name}"])]


@torch.no_grad()
@exact_float32()
def _predictions(
    network: torch.nn.Module,
    store: ExtraStore,
    shape: tuple[int, int, int],
    device: torch.device,
    display: ProgressDisplay,
) -> np.ndarray:
    labels = np.empty(len(store), dtype=np.int32)
    with display.task("labelling extra images", len(store), unit="images") as progress:
        for indices in torch.arange(len(store)).split(BATCH):
            images = resized(store.read(indices), shape)
            logits = network(to_unit(images.to(device), channels_last=False))
            labels[indices.numpy()] = logits.argmax(1).cpu().numpy()
            progress.advance(len(indices))
    return labels
