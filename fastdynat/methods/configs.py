"""Configurations for training: the defaults of a method, and the one that a run stores."""

from pathlib import Path
from typing import Any

from fastdynat.config import TrainConfig, override, read_config_file, to_flat
from fastdynat.errors import UserError
from fastdynat.methods import method_name, options_type
from fastdynat.runs import CONFIG, require_run
from fastdynat.user_code import check_stored, short_name, without_place

# Behaviour of runs from before an option existed, whose config.yaml lacks it.
BEFORE = {"flat_pixel_test": False, "sync_bn": "on"}


def _as_asked(asked: str, stored: str) -> str:
    """`asked` in the words of a message that sets it apart from `stored`."""
    other_content = " with another content" if short_name(asked) == short_name(stored) else ""
    return short_name(asked) + other_content


def default_config(method: str) -> TrainConfig[Any]:
    """The configuration of a plain ``fastdynat train --method METHOD``, unresolved."""
    return TrainConfig(method=method_name(method), options=options_type(method)())


def stored_config(path: Path, method: str | None = None) -> TrainConfig[Any]:
    """The resolved configuration of the run at `path`.

    Args:
        method: the run's method as the user names it now, or None; a user's file may have moved since.

    Raises:
        UserError: not a run; its config.yaml is damaged; `method` is another one; or the file of the run's
            method is gone or has changed.
    """
    require_run(path)
    origin = str(path / CONFIG)
    values = read_config_file(path / CONFIG)
    if not isinstance(values.get("method"), str):
        raise UserError(f"{origin} names no method: it is truncated or was edited")
    name = check_stored(values["method"], origin)
    if method is not None:
        asked = method_name(method)
        if without_place(asked) != without_place(name):
            raise UserError(
                f"{path} trains by {short_name(name)}, not by {_as_asked(asked, name)}; "
                "start a new run for that"
            )
        values["method"] = name = asked
    config = default_config(name)
    config = override(
        config, {key: old for key, old in BEFORE.items() if key in to_flat(config)} | values, origin
    )
    for name in (config.data.data, config.model.model, config.model.guide):
        check_stored(name, origin)
    return config
