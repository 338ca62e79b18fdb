"""Validation images that the weights at --init-from were trained on, because their run held out others."""

import logging
from pathlib import Path
from typing import Any

import torch

from fastdynat.config import DataConfig, TrainConfig
from fastdynat.data import TrainSplit
from fastdynat.data.split import stratified_split
from fastdynat.errors import UserError
from fastdynat.training.initial_weights import is_place
from fastdynat.training.source_runs import settings_of
from fastdynat.user_code import without_place

logger = logging.getLogger(__name__)


def held_out(val_size: float | None) -> int | float | None:
    """--val-size as `stratified_split` takes it: from 1 on a whole number of images."""
    return int(val_size) if val_size is not None and val_size >= 1 else val_size


def warn_of_seen_validation(config: TrainConfig[Any], split: TrainSplit) -> None:
    """Warn where the run of --init-from trained on validation images of `split`."""
    source = config.model.init_from
    theirs = None if source is None or not is_place(source) else settings_of(Path(source))
    if theirs is None or without_place(str(theirs.get("data"))) != without_place(config.data.data):
        return
    seed, val_size, limit = (theirs.get(name) for name in ("seed", "val_size", "train_size"))
    seen = _seen(split, config.data, config.engine.seed, seed, val_size, limit)
    if seen:
        logger.warning(
            "--init-from %s was trained with --seed %s: %d of the %d validation images are among its "
            "training images if the data are the same, so validation accuracy and the choice of the best "
            "checkpoint are optimistic; use its --seed and --val-size",
            source,
            seed,
            seen,
            len(split.val),
        )


def _seen(split: TrainSplit, data: DataConfig, own_seed: int, seed: Any, val_size: Any, limit: Any) -> int:
    """The number of validation images of `split` among the training images of a run with these settings."""
    labels = split.source.labels
    try:
        _, own = stratified_split(labels, val_size=held_out(data.val_size), limit=None, seed=own_seed)
        if not torch.equal(own, split.val):  # chosen by the user, whatever the seed
            return 0
        train, _ = stratified_split(labels, val_size=held_out(val_size), limit=limit, seed=seed)
    except (UserError, TypeError, ValueError):  # settings of other data, or of an edited document
        return 0
    return int(torch.isin(split.val, train).sum())
