"""Extra images of a run: packed where they are not yet, and checked against the dataset."""

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fastdynat.config import ExtraConfig, TrainConfig
from fastdynat.data import UNLABELLED, DatasetInfo, dataset_info
from fastdynat.data.extra_store import ExtraSet, ExtraStore
from fastdynat.data.pack_sources import PackSource
from fastdynat.data.store_writer import packed
from fastdynat.distributed import world
from fastdynat.errors import UserError
from fastdynat.methods import method_class
from fastdynat.terminal.consoles import error_console
from fastdynat.terminal.progress import ProgressDisplay
from fastdynat.training.pseudo_labels import label_file, read_labels
from fastdynat.tuning.devices import pick_device

logger = logging.getLogger(__name__)

SAID_CLASSES = 10
NUMBER = re.compile(r"[0-9]{1,6}")


def open_extra(config: TrainConfig[Any], info: DatasetInfo) -> ExtraSet | None:
    """The extra images of `config` for a dataset with the facts `info`; None where it uses none.

    Images that are not packed yet are packed, and labelled where `extra_labels` asks for it.

    Raises: UserError for images that are missing, damaged, of another shape or not those of
        `extra_checksum`, and for labels that the dataset does not have.
    """
    extra = config.extra
    if extra.extra_data is None or extra.extra_share == 0:
        return None
    display = ProgressDisplay(error_console(), quiet=config.run.quiet or not world().first)

    def check_source(source: PackSource) -> None:
        _check_shape(source.shape, config, info)
        if extra.extra_labels is None and not source.labelled:
            _check_unlabelled(extra.extra_data, config)

    store = packed(Path(extra.extra_data), config.data.image_size, display, check_source)
    _check_shape(store.facts.shape, config, info)
    if extra.extra_labels is None:
        found = ExtraSet(store, _labels(store, config, info), info.image_shape)
        numbered = store.labels is not None and store.facts.class_names is None
    else:
        file = label_file(store, extra.extra_labels, info, pick_device(config.engine.device), display)
        found = ExtraSet(store, read_labels(file, store, info), info.image_shape, file)
        numbered = file == Path(extra.extra_labels).absolute()
    if numbered and dataset_info(config.data.data) is None and world().first:
        _say_meaning(info)
    if extra.extra_checksum not in (None, found.checksum):
        raise UserError(
            f"extra_checksum {extra.extra_checksum}: {store.folder} has {found.checksum}, so it holds other "
            "images or labels; restore the original ones, or start a new run"
        )
    return found


def recorded_extra(extra: ExtraConfig, found: ExtraSet | None) -> ExtraConfig:
    """`extra` as a run stores it: with the place of the store, and the checksum."""
    if found is None:
        return extra
    labels = None if found.label_file is None else str(found.label_file)
    return replace(
        extra, extra_data=str(found.store.folder), extra_labels=labels, extra_checksum=found.checksum
    )


def _check_shape(shape: tuple[int, int, int], config: TrainConfig[Any], info: DatasetInfo) -> None:
    wanted = info.image_shape
    if shape == wanted or (config.data.image_size is not None and shape[0] == wanted[0]):
        return
    remedy = "" if shape[0] != wanted[0] else ", or resize both by --image-size"
    raise UserError(
        f"the extra images in {config.extra.extra_data} are {_sides(shape)} (channels, height, width), but "
        f"those of {info.name} are {_sides(wanted)}; use others{remedy}"
    )


def _sides(shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, shape))


def _check_unlabelled(path: str | Path | None, config: TrainConfig[Any]) -> None:
    """Raise UserError if the run needs the labels that the extra images at `path` do not have."""
    if not method_class(config.method).semi_supervised:
        raise UserError(
            f"the extra images in {path} have no labels, which method {config.method} needs; "
            "label them with a network: --extra-labels RUN"
        )
    if config.optim.burn_in > 0:
        raise UserError(
            f"burn_in {config.optim.burn_in}: natural training needs every label, but the extra images in "
            f"{path} have none; leave --burn-in out, or label them with a network: --extra-labels RUN"
        )
    if mixing := config.augmentation.mixing:
        raise UserError(f"{mixing}: the extra images in {path} have no labels to mix; leave it out")


def _labels(store: ExtraStore, config: TrainConfig[Any], info: DatasetInfo) -> np.ndarray:
    """Labels (M,) in [0, num_classes), or UNLABELLED where the method needs none.

    Class folders have the labels of the dataset's classes of the same names. Where the dataset has no such
    names, folders named by whole numbers have these labels.
    """
    labels = store.labels
    if labels is None:
        _check_unlabelled(store.folder, config)
        return np.full(len(store), UNLABELLED, dtype=np.int32)
    names, odd = store.facts.class_names, _odd_number(info)
    if names is not None:
        by_number = (
            odd is None and all(map(NUMBER.fullmatch, names)) and not set(names) <= {*info.class_names}
        )
        labels = _renumbered(
            labels, [int(name) for name in names] if by_number else _places(store, names, info)
        )
    elif odd is not None:
        raise UserError(
            f"{store.folder} has labels without class names, but the class {info.class_names[odd]!r} of "
            f"{info.name} has label {odd}, so a label may mean two classes; pack class folders again, or "
            "give the labels by --extra-labels FILE.npy"
        )
    if int(labels.max()) >= info.num_classes:
        bad = int(np.argmax(labels >= info.num_classes))
        raise UserError(
            f"{store.folder}: label {labels[bad]} at index {bad} is outside [0, {info.num_classes}), "
            f"the classes of {info.name}"
        )
    return labels


def _say_meaning(info: DatasetInfo) -> None:
    """Say what labels without names mean in a dataset that numbers its own class names."""
    if info.class_names != tuple(map(str, range(info.num_classes))):
        pairs = [f"{label} = {name}" for label, name in enumerate(info.class_names)]
        shown = [*pairs[:SAID_CLASSES], "..."] if len(pairs) > SAID_CLASSES else pairs
        logger.info("extra labels are read as %s", ", ".join(shown))


def _odd_number(info: DatasetInfo) -> int | None:
    """A label whose class is named by another number, such as 2 for the folder "10"; None without one."""
    named = ((label, name) for label, name in enumerate(info.class_names) if NUMBER.fullmatch(name))
    return next((label for label, name in named if int(name) != label), None)


def _places(store: ExtraStore, names: Sequence[str], info: DatasetInfo) -> list[int]:
    """The labels of the dataset's classes called `names`."""
    unknown = [name for name in names if name not in info.class_names]
    if unknown:
        raise UserError(
            f"{store.folder}: {unknown[0]!r} is no class of {info.name}; name the class folders like its "
            f"classes ({', '.join(info.class_names[:3])}, ...)"
            f"{' or by their numbers' if _odd_number(info) is None else ''}"
        )
    return [info.class_names.index(name) for name in names]


def _renumbered(labels: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
    """`numbers` at `labels`; the labels themselves, mapped into memory, where nothing changes."""
    table = np.array(numbers, dtype=np.int32)
    return labels if (table == np.arange(len(table))).all() else table[labels]
