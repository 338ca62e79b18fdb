"""Warnings about a --config file: keys without effect, and values that fitted what a flag now replaces."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from fastdynat.commands.parsing.effects import defaults_of, idle_keys, value_of
from fastdynat.config import TrainConfig, to_flat

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
    # A run stores every key, with or without effect.
    if found and not values.keys() >= to_flat(config).keys():
        yield f"--config {file}: without effect: {', '.join(found)}"
    for key, followers in FOLLOWS.items():
        if key not in flags or key not in values or values[key] == value_of(config, key):
            continue
        kept = [name for name in followers if name not in flags and values.get(name) not in OPEN]
        if kept:
            told = " and ".join(f"{name} {values[name]}" for name in kept)
            remedy = ", ".join(f"--{name.replace('_', '-')}" for name in kept)
            yield (
                f"--{key} {value_of(config, key)} replaces {values[key]} of {file}, which still sets {told}; "
                f"give {remedy}, or remove them from the file for the usual values"
            )
