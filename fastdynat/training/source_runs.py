"""Runs that trained the weights at --init-from and --guide-from, as far as their folders tell."""

import logging
from pathlib import Path
from typing import Any

from fastdynat.config import TrainConfig, read_config_file
from fastdynat.errors import UserError
from fastdynat.methods import Method
from fastdynat.runs import CONFIG

logger = logging.getLogger(__name__)

ABOVE = 3  # folders of a weights file inside its run: RUN/last/model.safetensors, RUN/checkpoints/...


def settings_of(path: Path) -> dict[str, Any] | None:
    """The settings of the run at `path`, or of that with the weights file `path`; None if unknown."""
    run = next((p for p in (path, *path.parents[:ABOVE]) if (p / CONFIG).is_file()), None)
    try:
        return None if run is None else read_config_file(run / CONFIG)
    except UserError:  # a damaged document: the weights beside it are checked by themselves
        return None


def warn_of_other_guide(config: TrainConfig[Any], method: Method[Any]) -> None:
    """Warn where the run of --guide-from had other settings than `Method.guide_settings`."""
    source = config.model.guide_from
    theirs = None if source is None else settings_of(Path(source))
    wanted = method.guide_settings
    others = (
        {key: theirs[key] for key in wanted if key in theirs and theirs[key] != wanted[key]} if theirs else {}
    )
    if others:
        found = " and ".join(f"{key} {value}" for key, value in others.items())
        logger.warning(
            "--guide-from %s was trained with %s; the guide of %s is made by: fastdynat train --method %s",
            source,
            found,
            method.name,
            method.guide_made_by,
        )
