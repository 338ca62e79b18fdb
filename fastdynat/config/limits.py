"""The largest value of each number of a configuration: beyond it a typing error is certain, and memory or a
lifetime at stake.

The smallest values and shares are in `fastdynat.config.rules`; what depends on other flags is checked where
these are resolved.
"""

from dataclasses import fields
from typing import Any

from fastdynat.documents import shown
from fastdynat.errors import UserError

MAX_IMAGE_SIZE = 4096  # pixels on a side
IMAGES, BATCH, EPOCHS = 10**9, 10**6, 10**6
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
    "schedule_ahead": 10**6,
    "lr": 1e30,
    "burn_in_lr": 1e30,
    "weight_decay": 1e3,
    "gamma": 1e3,
    "clip_grad": 1e9,
    # run and measurement
    "patience": EPOCHS,
    "val_every": EPOCHS,
    "stop_after": EPOCHS,
    "save_every": 10**6,  # minutes
    "seconds": 10**6,
    "budget": 10**8,
    "budget_seconds": 10**8,
    "repeats": 10**6,
}


def check_limits(config: Any) -> None:
    """Raise UserError where a number of the dataclass `config` is larger than any run can use."""
    for field in fields(config):
        value, most = getattr(config, field.name), MOST.get(field.name)
        if most is not None and isinstance(value, (int, float)) and value > most:
            raise UserError(f"{field.name} must be at most {most:g}, got {shown(value)}")
