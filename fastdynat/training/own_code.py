"""Networks and data of the user in the configuration of a run."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastdynat.config import TrainConfig
from fastdynat.errors import UserError
from fastdynat.user_code import HUB, is_hub_data, is_user_supplied, pin, short_name, unpinned, without_place


def pin_own_code(config: TrainConfig[Any]) -> TrainConfig[Any]:
    """`config` with the absolute path of each file or folder of the user that it names, and digests of code.

    Raises:
        UserError: such a file cannot be read.
    """
    model = replace(config.model, model=pin(config.model.model), guide=pin(config.model.guide))
    return replace(config, data=replace(config.data, data=_placed(config.data.data)), model=model)


def _placed(data: str) -> str:
    """`data` by a name that means the same from another directory."""
    if is_hub_data(data):
        folder = Path(data.removeprefix(HUB)).expanduser()
        return f"{HUB}{folder.absolute()}" if folder.is_dir() else data
    return pin(data)


def refuse_changed_code(stored: TrainConfig[Any], asked: TrainConfig[Any]) -> None:
    """Raise UserError where a file of the user has changed since the run `stored` began; both are pinned."""
    for before, now in (
        (stored.data.data, asked.data.data),
        (stored.model.model, asked.model.model),
        (stored.model.guide, asked.model.guide),
    ):
        if without_place(before) != without_place(now) and unpinned(before) == unpinned(now):
            raise UserError(
                f"{unpinned(now)}: the file has changed since the run began with it; restore its old "
                "content, or start a new run"
            )


def data_folder_name(data: str) -> str:
    """The part of a run directory's name that says what it was trained on."""
    if is_hub_data(data):
        data = data.rstrip("/").rpartition("/")[2]
    elif is_user_supplied(data):
        data = short_name(data)
    return re.sub(r"[^A-Za-z0-9_-]+", "-", data).strip("-")
