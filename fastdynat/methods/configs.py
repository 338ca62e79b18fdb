"""Whole configurations of a method, without torch: its defaults, and what a run has stored."""

from pathlib import Path
from typing import Any

from fastdynat.config import TrainConfig, read_yaml, to_flat, update
from fastdynat.errors import UserError
from fastdynat.methods import method_name, options_type
from fastdynat.runs import CONFIG, require_run

# What a run did before there was the option: its config.yaml does not name it, and it goes on as it began.
BEFORE = {"flat_pixel_test": False}


def default_config(method: str) -> TrainConfig[Any]:
    """The configuration of a plain ``fastdynat train --method METHOD``, unresolved."""
    return TrainConfig(method=method_name(method), options=options_type(method)())


def stored_config(path: Path) -> TrainConfig[Any]:
    """The resolved configuration of the run at `path`.

    Raises:
        UserError: not a run, or its config.yaml is damaged.
    """
    require_run(path)
    origin = str(path / CONFIG)
    values = read_yaml(path / CONFIG)
    if not isinstance(values.get("method"), str):
        raise UserError(f"{origin} names no method: it is truncated or was edited")
    config = default_config(values["method"])
    return update(
        config, {key: old for key, old in BEFORE.items() if key in to_flat(config)} | values, origin
    )
