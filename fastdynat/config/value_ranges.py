"""Ranges of the numbers of a configuration, by key: a key means the same in every group and command.

A largest value is either a share's end or a bound that no run reaches, beyond which a number is a typing
error. Numbers that depend on other keys are in `fastdynat.config.train_checks`.
"""

import math
import re
from dataclasses import dataclass, fields
from typing import Any

from fastdynat.config.attack_config import AttackConfig, given_radii, norms_of
from fastdynat.documents import short_repr
from fastdynat.errors import UserError
from fastdynat.units import parse_size

DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,4})?")
RADII = ("eps", "step_size", "eval_eps")
L2_LIMIT = 1e4  # above the diameter of any image space here; the exact one is known with the data
MAX_IMAGE_SIZE = 4096  # pixels on a side
IMAGES, BATCH, EPOCHS = 10**9, 10**6, 10**6
LARGEST: dict[str, float] = {
    # images
    "train_size": IMAGES,
    "labelled": IMAGES,
    "val_size": IMAGES,
    "num_images": IMAGES,
    "check_fidelity": IMAGES,
    "boundary_speed": IMAGES,
    "batch_size": BATCH,
    "grad_accum_steps": BATCH,
    "eval_batch_size": BATCH,
    "workers": 1024,
    "epoch_steps": 10**6,
    # augmentation
    "cutout": MAX_IMAGE_SIZE,
    "color_jitter": 100,
    **dict.fromkeys(("mixup", "cutmix"), 1000),
    "mixup_groups": BATCH,
    # attack and optimiser
    "steps": 100_000,
    **dict.fromkeys(("eps_ramp", "step_ramp"), EPOCHS),
    "awp": 1,
    "awp_warmup": EPOCHS,
    "epochs": EPOCHS,
    "ema_from": EPOCHS,
    "burn_in": EPOCHS,
    "bn_reset_epoch": EPOCHS,
    "logit_scale": 1e4,
    "schedule_ahead": 10**6,
    "lr": 1e30,
    "burn_in_lr": 1e30,
    "warmup_lr": 1e30,
    "min_lr": 1e30,
    "head_lr_scale": 1e6,
    "opt_eps": 1e3,
    "schedule_epochs": EPOCHS,
    "warmup_epochs": EPOCHS,
    "weight_decay": 1e3,
    "gamma": 1e3,
    "clip_grad": 1e9,
    # run and measurement
    "patience": EPOCHS,
    "val_every": EPOCHS,
    "stop_after": EPOCHS,
    "save_every": 10**6,  # minutes
    "rank_timeout": 10**5,
    "seconds": 10**6,
    "budget": 10**8,
    "budget_seconds": 10**8,
    "repeats": 10**6,
    "seeds": 1000,
}


@dataclass(frozen=True)
class Range:
    """The values that a number may have.

    Attributes:
        least, most: the ends, which belong to the range unless `open_least` or `open_most` says otherwise.
            Only shares have a finite `most` here; `LARGEST` bounds the other numbers.
        text: the range in words, after "must be".
        remedy: appended to the message, after the number that was given.
    """

    least: float
    most: float
    text: str
    remedy: str = ""
    open_least: bool = False
    open_most: bool = False

    def check(self, key: str, value: float) -> None:
        """Raise UserError if `value` is outside of the range or NaN."""
        above = value > self.least if self.open_least else value >= self.least
        below = value < self.most if self.open_most else value <= self.most
        if above and below and math.isfinite(value):
            return
        number = value if isinstance(value, int) and abs(value) < 1e18 else f"{float(value):g}"
        raise UserError(f"{key} must be {self.text}, got {number}{self.remedy}")


def _from(least: int, text: str = "", remedy: str = "") -> Range:
    return Range(least, math.inf, text or f">= {least}", remedy)


def _above(least: float, unit: str = "") -> Range:
    return Range(least, math.inf, f"above {least:g}{unit and ' ' + unit}", open_least=True)


SHARE = Range(0, 1, "in [0, 1]")
KEEP_RATE = Range(0, 1, "in [0, 1)", open_most=True)
SHARE_OF_RUN = Range(0, 1, "a share of the run in [0, 1)", open_most=True)
VALIDATION_IMAGES = _from(0, "a number of validation images, 0 for none")
RANGES = {
    **dict.fromkeys(("batch_size", "eval_batch_size", "num_images", "grad_accum_steps"), _from(1)),
    **dict.fromkeys(("train_size", "labelled"), _from(1)),
    "val_size": _from(0, "a number of images or a share below 1"),
    "image_size": Range(1, MAX_IMAGE_SIZE, f"between 1 and {MAX_IMAGE_SIZE} pixels"),
    "workers": _from(0),
    "extra_share": Range(0, 1, "a share of the batch in [0, 1)", open_most=True),
    "epoch_steps": _from(1, "a number of updates >= 1", "; leave it out for one pass"),
    "color_jitter": _from(0, "a distance of factors from 1, 0 for none", " (usual: 0.4)"),
    "cutout": _from(0, "a number of pixels per side, 0 for none"),
    **dict.fromkeys(("reprob", "mixup_prob", "mixup_switch_prob"), SHARE),
    **dict.fromkeys(("mixup", "cutmix"), _from(0, "an alpha >= 0, 0 for none", " (usual: 0.8 and 1.0)")),
    "mixup_groups": _from(1, "a number of groups >= 1"),
    "bn_momentum": Range(0, 1, "a share in (0, 1]", "; 0.1 is usual", open_least=True),
    "bn_reset_epoch": _from(0, "an epoch counted from 0"),
    "logit_scale": _above(0),
    "steps": _from(0),
    "early_share": SHARE,
    **dict.fromkeys(("eps_ramp", "step_ramp"), _from(0, "a number of epochs, 0 for none")),
    "awp": _from(0, "in [0, 1], a share of each tensor's norm", " (the published sizes are 0.005 and 0.01)"),
    "awp_warmup": _from(0, "a number of epochs"),
    "epochs": _from(1),
    **dict.fromkeys(("lr", "burn_in_lr"), _above(0)),  # a rate that diverges says so
    **dict.fromkeys(("momentum", "base_momentum", "max_momentum", "ema", "label_smoothing"), KEEP_RATE),
    **dict.fromkeys(("weight_decay", "gamma", "clip_grad"), _from(0)),
    "schedule_ahead": _from(0, "a number of updates >= 0"),
    "schedule_epochs": _from(1, "a number of epochs >= 1", "; leave it out for all of the method's"),
    "warmup_epochs": _from(0, "a number of epochs"),
    **dict.fromkeys(("warmup_lr", "min_lr"), _from(0)),
    **dict.fromkeys(("opt_eps", "head_lr_scale"), _above(0)),
    "layer_decay": Range(0, 1, "a factor in (0, 1]", "; 0.75 is usual", open_least=True),
    "ema_warmup": SHARE_OF_RUN,
    "ema_from": _from(0, "a number of epochs"),
    "warmup": SHARE_OF_RUN,
    **dict.fromkeys(("check_fidelity", "boundary_speed"), VALIDATION_IMAGES),
    "stop_at": Range(0, 1, "a share in (0, 1]", "; write 45 % as 0.45", open_least=True),
    "patience": _from(1, "a number of validations >= 1"),
    **dict.fromkeys(("save_every", "rank_timeout"), _above(0, "minutes")),
    **dict.fromkeys(("val_every", "stop_after"), _from(1)),
    "seconds": _above(0),
    "repeats": _from(1),
    **dict.fromkeys(("budget", "budget_seconds"), _above(0, "seconds")),
    "target": Range(0, 1, "a share in (0, 1]", "; write 30 % as 0.30", open_least=True),
    "seeds": _from(1),
    "tolerance": Range(0, 1, "a share in [0, 1)", open_most=True),
}


def check_values(part: Any) -> None:
    """Raise UserError for a value of the dataclass `part` that is outside of its range, or for empty text."""
    check_largest(part)
    for field in fields(part):
        key, value = field.name, getattr(part, field.name)
        if key in RANGES and isinstance(value, (int, float)):
            RANGES[key].check(key, value)
        elif key == "seed":
            check_seed(value)
        elif isinstance(value, str) and not value.strip():
            raise UserError(f"{key} must not be empty; leave it out for its default")
        elif key == "device" and not DEVICE.fullmatch(value):
            raise UserError(
                f"device {short_repr(value)} cannot be used (only cpu and cuda are supported): "
                "write cpu, cuda, cuda:N or auto"
            )


def check_largest(part: Any) -> None:
    """Raise UserError for a number of the dataclass `part` that is larger than any run can use."""
    for field in fields(part):
        value, most = getattr(part, field.name), LARGEST.get(field.name)
        if most is not None and isinstance(value, (int, float)) and value > most:
            raise UserError(f"{field.name} must be at most {most:g}, got {short_repr(value)}")


def check_seed(seed: int) -> None:
    """Raise UserError for a seed that torch's generators do not take."""
    if not 0 <= seed < 2**63:
        raise UserError(f"seed must be in [0, 2**63), got {seed}")


def check_radii(part: Any, norm: str) -> None:
    """Raise UserError for a radius or step of the dataclass `part` that is invalid under `norm` (or auto)."""
    for key in RADII:
        value = getattr(part, key, "auto")
        if value != "auto":
            limit = 1.0 if norm == "linf" else L2_LIMIT
            parse_size(value, key, norm="l2" if norm == "auto" else norm, limit=limit)


def size_notices(attack: AttackConfig) -> list[str]:
    """A sentence for each radius or step of `attack` that is read otherwise than it is written, as eps 8."""
    norm, *others = norms_of(attack)
    sizes = [(key, getattr(attack, key), norm) for key in RADII]
    radii = zip((norm, *others), given_radii(attack), strict=True)
    sizes += [(f"norm_eps ({name})", radius, name) for name, radius in radii]
    found = (parse_size(size, key, norm=n, limit=math.inf) for key, size, n in sizes if size != "auto")
    return [size.notice for size in found if size.notice is not None]
