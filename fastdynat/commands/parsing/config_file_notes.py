"""Warnings about a --config file: keys without effect, and values that fitted what a flag now replaces."""

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastdynat.commands.parsing.effects import defaults_of, idle_keys, value_of
from fastdynat.config import TrainConfig
from fastdynat.config.value_ranges import RADII
from fastdynat.errors import UserError
from fastdynat.runs.layout import is_run_config
from fastdynat.units import parse_size

# Keys that a run fills in from another one when they are left out, and stores.
FOLLOWS = {
    "eps": ("step_size", "eval_eps"),
    "norm": ("eps", "step_size", "eval_eps"),
    "opt": ("lr", "weight_decay", "opt_betas", "opt_eps"),
}
OPEN = (None, "auto")


def config_file_notes(
    file: str, values: Mapping[str, Any], config: TrainConfig[Any], given: Collection[str]
) -> Iterator[str]:
    """Warnings, each one line.

    Args:
        file: the name of the file.
        values: its keys.
        config: what file and flags mean together.
        given: the flags on the command line, with their dashes.
    """
    flags = {flag.removeprefix("--").replace("-", "_") for flag in given}
    idle, defaults = idle_keys(config), defaults_of(config)
    found = [
        f"{key} ({idle[key]})"
        for key in values
        if key in idle and key not in flags and value_of(config, key) != defaults.get(key)
    ]
    # A run stores every key of its version, with or without effect.
    if found and not is_run_config(Path(file)):
        yield f"--config {file}: without effect: {', '.join(found)}"
    replaced: dict[tuple[str, ...], list[str]] = {}
    for key, followers in FOLLOWS.items():
        kept = tuple(name for name in followers if name not in flags and values.get(name) not in OPEN)
        if kept and key in flags and key in values and not _is_as_before(key, values, config):
            replaced.setdefault(kept, []).append(f"--{key} {value_of(config, key)} replaces {values[key]}")
    for kept, changes in replaced.items():
        told = " and ".join(f"{name} {values[name]}" for name in kept)
        remedy = ", ".join(f"--{name.replace('_', '-')}" for name in kept)
        yield (
            f"{' and '.join(changes)} of {file}, which still sets {told}; give {remedy}, or remove them from "
            "the file for the usual values"
        )


def _is_as_before(key: str, values: Mapping[str, Any], config: TrainConfig[Any]) -> bool:
    """True if `config` has the value of `key` in `values`; a radius may be written in another way."""
    before, now, norm = values[key], value_of(config, key), config.attack.norm
    if before == now or key not in RADII or "auto" in (before, now):
        return bool(before == now)
    with suppress(UserError):  # what the file says is replaced, so nothing has checked it
        return _radius(before, values.get("norm", norm)) == _radius(now, norm)
    return False


def _radius(written: float | str, norm: str) -> float:
    """The radius `written`, in [0, 1] pixel units."""
    return parse_size(written, "eps", norm=norm, limit=math.inf).value
