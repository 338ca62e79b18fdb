"""The largest value of each number of a configuration: beyond it a typing error is certain, and memory or a lifetime at stake.

The smallest values, which depend on other flags, are checked where the flags are resolved.
"""

from dataclasses import fields
from typing import Any

from fastdynat.documents import shown
from fastdynat.errors import UserError

MAX_IMAGE_SIZE = 4096  # pixels on a side
IMAGES, BATCH, EPOCHS, SECONDS = 10**9, 10**6, 10**6, 10**9
MOST: dict[str, float] = {
    # images
    "train_size": IMAGES,
    "labelled": IMAGES,
    "val_size": IMAGES,
    "num_images": IMAGES,
    "check_fidelity": IMAGES,
    "boundary_speed": IMAGES,
    "batch_size": BATCH,
    "eval_batch_size": BATCH,
    "workers": 1024,
    "epoch_steps": 10**6,
    # attack and optimiser
    "steps": 100_000,
    "awp": 1,
    "awp_warmup": EPOCHS,
    "epochs": EPOCHS,
    "burn_in": EPOCHS,
    "bn_reset_epoch": EPOCHS,
    "schedule_ahead": 10**9,
    "lr": 1e30,
    "burn_in_lr": 1e30,
    "weight_decay": 1e9,
    "gamma": 1e9,
    "clip_grad": 1e30,
    # run and measurement
    "patience": EPOCHS,
    "val_every": EPOCHS,
    "stop_after": EPOCHS,
    "save_every": SECONDS,
    "seconds": SECONDS,
    "budget": SECONDS,
    "budget_seconds": SECONDS,
    "repeats": 10**6,
}


def check_limits(config: Any) -> None:
    """Raise UserError where a number of the dataclass `config` is larger than any run can use."""
    for field in fields(config):
        value, most = getattr(config, field.name), MOST.get(field.name)
        if most is not None and isinstance(value, (int, float)) and value > most:
            raise UserError(f"{field.name} must be at most {most:g}, got {shown(value)}")
