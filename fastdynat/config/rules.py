"""What can be said of a configuration before anything is imported or read: limits of values, and which
exclude others.

What depends on data, method or machine is checked by `fastdynat.training.resolve`.
"""

import math
import re
from dataclasses import dataclass, fields
from typing import Any

from fastdynat.config import AttackConfig, DataConfig, OptimConfig, TrainConfig, check_seed, limits
from fastdynat.errors import UserError, shown, unknown_name
from fastdynat.units import parse_size
from fastdynat.user_code import is_user_supplied

DATASETS = ("digits", "cifar10", "cifar100", "svhn", "mnist", "imagefolder")
DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,4})?")
# Where one-cycle and triangular schedules peak, as a share of the run: torch's OneCycleLR, Wong et al. 2020.
WARMUP = {"onecycle": 0.3, "triangular": 0.5}
RADII = ("eps", "step_size", "eval_eps")
L2_LIMIT = 1e4  # above the diameter of any image space here; the exact one is known with the data


@dataclass(frozen=True)
class Limit:
    """The values that a number may have.

    Attributes:
        least, most: the ends of the range, which belong to it unless they are `open_least`, `open_most`. Only
            shares have a `most` here: where plain numbers end is in `fastdynat.config.limits`.
        text: what the number must be.
        remedy: what follows the number that was given.
    """

    least: float
    most: float
    text: str
    remedy: str = ""
    open_least: bool = False
    open_most: bool = False

    def check(self, key: str, value: float) -> None:
        """Raise UserError where `value` is out of the range; NaN is."""
        above = value > self.least if self.open_least else value >= self.least
        below = value < self.most if self.open_most else value <= self.most
        if above and below and math.isfinite(value):
            return
        number = value if isinstance(value, int) and abs(value) < 1e18 else f"{float(value):g}"
        raise UserError(f"{key} must be {self.text}, got {number}{self.remedy}")


def _from(least: int, text: str = "", remedy: str = "") -> Limit:
    return Limit(least, math.inf, text or f">= {least}", remedy)


def _above(least: float, what: str = "") -> Limit:
    return Limit(least, math.inf, f"above {least:g}{what and ' ' + what}", open_least=True)


SHARE = Limit(0, 1, "in [0, 1]")
KEEP = Limit(0, 1, "in [0, 1)", open_most=True)
OF_RUN = Limit(0, 1, "a share of the run in [0, 1)", open_most=True)
IMAGES = _from(0, "a number of validation images, 0 for none")
SIZE = limits.MAX_IMAGE_SIZE
# By key: groups and commands that have a key mean the same by it.
LIMITS = {
    **dict.fromkeys(("batch_size", "eval_batch_size", "num_images"), _from(1)),
    **dict.fromkeys(("train_size", "labelled"), _from(1)),
    "val_size": _from(0, "a number of images or a share below 1"),
    "image_size": Limit(1, SIZE, f"between 1 and {SIZE} pixels"),
    "workers": _from(0),
    "epoch_steps": _from(1, "a number of updates >= 1", "; leave it out for one pass"),
    "bn_momentum": Limit(0, 1, "a share in (0, 1]", "; 0.1 is usual", open_least=True),
    "bn_reset_epoch": _from(0, "an epoch counted from 0"),
    "steps": _from(0),
    "early_share": SHARE,
    "awp": _from(0, "in [0, 1], a share of each tensor's norm", " (the published sizes are 0.005 and 0.01)"),
    "awp_warmup": _from(0, "a number of epochs"),
    "epochs": _from(1),
    **dict.fromkeys(("lr", "burn_in_lr"), _above(0)),  # a rate that diverges says so
    **dict.fromkeys(("momentum", "base_momentum", "max_momentum", "ema"), KEEP),
    **dict.fromkeys(("weight_decay", "gamma", "clip_grad"), _from(0)),
    "schedule_ahead": _from(0, "a number of updates >= 0"),
    "ema_warmup": OF_RUN,
    "warmup": OF_RUN,
    **dict.fromkeys(("check_fidelity", "boundary_speed"), IMAGES),
    "stop_at": Limit(0, 1, "a share in (0, 1]", "; write 45 % as 0.45", open_least=True),
    "patience": _from(1, "a number of validations >= 1"),
    "save_every": _above(0, "minutes"),
    **dict.fromkeys(("val_every", "stop_after"), _from(1)),
    "seconds": _above(0),
    "repeats": _from(1),
    **dict.fromkeys(("budget", "budget_seconds"), _above(0, "seconds")),
    "tolerance": Limit(0, 1, "a share in [0, 1)", open_most=True),
}


def check_limits(part: Any) -> None:
    """Raise UserError for a value of the dataclass `part` that is out of its limits, or an empty text."""
    limits.check_limits(part)
    for field in fields(part):
        key, value = field.name, getattr(part, field.name)
        if key in LIMITS and isinstance(value, (int, float)):
            LIMITS[key].check(key, value)
        elif key == "seed":
            check_seed(value)
        elif isinstance(value, str) and not value.strip():
            raise UserError(f"{key} must not be empty; leave it out for its default")
        elif key == "device" and not DEVICE.fullmatch(value):
            raise UserError(
                f"device {shown(value)} cannot be used (only cpu and cuda are supported): write cpu, cuda, cuda:N or auto"
            )


def check_radii(part: Any, norm: str) -> None:
    """Raise UserError for a radius or step of the dataclass `part` that is none under `norm`, which may be
    "auto".
    """
    for key in RADII:
        value = getattr(part, key, "auto")
        if value != "auto":
            parse_size(
                value, key, norm="l2" if norm == "auto" else norm, limit=1.0 if norm == "linf" else L2_LIMIT
            )


def check_config(config: TrainConfig[Any]) -> None:
    """Raise UserError for what cannot work in `config`, whatever the data, the method's class and the machine
    are.
    """
    for part in (config.data, config.model, config.attack, config.optim, config.engine, config.run):
        check_limits(part)
    check_data(config.data)
    check_attack(config.attack)
    check_optim(config.optim)
    check_run(config.run, config.data)


def check_data(data: DataConfig) -> None:
    """Raise UserError for an unknown dataset."""
    if data.data not in DATASETS and not is_user_supplied(data.data):
        raise unknown_name("dataset", data.data, DATASETS)


def check_attack(attack: AttackConfig) -> None:
    """Raise UserError for radii and steps that cannot work."""
    check_radii(attack, attack.norm)
    steps = 1e6 if attack.steps is None else attack.steps
    if attack.early_steps is not None and not 0 <= attack.early_steps <= steps:
        raise UserError(f"early_steps must be between 0 and steps ({steps:g}), got {attack.early_steps}")


def check_optim(optim: OptimConfig) -> None:
    """Raise UserError for options of the optimiser and the schedule that exclude each other."""
    most = math.inf if optim.epochs is None else optim.epochs
    if not 0 <= optim.burn_in < min(most, 1e6):
        below = "" if optim.epochs is None else f" ({optim.epochs})"
        raise UserError(f"burn_in must be a number of epochs below --epochs{below}, got {optim.burn_in}")
    if optim.ema == 0 and (optim.ema_warmup > 0 or optim.ema_buffers != "average"):
        name = "ema_warmup" if optim.ema_warmup > 0 else "ema_buffers"
        raise UserError(
            f"{name} {getattr(optim, name)}: there is no weight average; turn it on with --ema 0.995, or leave this out"
        )
    if optim.nesterov and optim.momentum == 0:
        raise UserError("nesterov needs momentum above 0")
    if not all(0 < m < 1 for m in optim.milestones):
        raise UserError(f"milestones must be shares of the run between 0 and 1, got {list(optim.milestones)}")
    if optim.warmup is not None and optim.schedule not in WARMUP:
        those = " or ".join(WARMUP)
        raise UserError(
            f"warmup {optim.warmup:g}: schedule {optim.schedule} has none; leave it out, or use --schedule {those}"
        )


def check_run(run: Any, data: DataConfig) -> None:
    """Raise UserError for a stop that needs validation images where there are none."""
    for name, used in (
        ("stop_at", run.stop_at),
        ("patience", run.patience),
        ("on_collapse stop", run.on_collapse == "stop"),
    ):
        if used and data.val_size == 0:
            raise UserError(f"{name} needs validation images: leave --val-size 0 out")
