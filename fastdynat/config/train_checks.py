"""Combinations of training keys that exclude each other, refused before anything is imported or read.

Needs neither data nor torch; what depends on data, method or machine is checked by
`fastdynat.training.resolve`.
"""

import math
import re
from typing import Any

from fastdynat.config.attack_config import AttackConfig, norms_of
from fastdynat.config.augmentation_config import AugmentationConfig
from fastdynat.config.augmentation_policy import parse_policy
from fastdynat.config.data_config import DataConfig
from fastdynat.config.extra_config import ExtraConfig
from fastdynat.config.optim_config import OptimConfig
from fastdynat.config.optimizer_kinds import check_optimizer
from fastdynat.config.train_config import GROUPS, TrainConfig
from fastdynat.config.value_ranges import L2_LIMIT, check_radii, check_values
from fastdynat.errors import UserError, unknown_name
from fastdynat.units import parse_size
from fastdynat.user_code import is_hub_data, is_user_supplied

DATASETS = ("digits", "cifar10", "cifar100", "svhn", "mnist", "imagefolder")
TRAINING_NORMS = ("linf", "l2", "l1")
# Peak of the one-cycle and triangular schedules, as a share of the run: torch's OneCycleLR, Wong et al. 2020.
WARMUP = {"onecycle": 0.3, "triangular": 0.5}
FLOORED = ("cosine", "triangular")  # with a learning rate at their end that can be given
LINEAR_WARMUP = ("cosine", "multistep", "constant")  # schedules that --warmup-epochs may precede


def check_train_config(config: TrainConfig[Any]) -> None:
    """Raise UserError for a value or a combination that cannot work with any data, method or machine."""
    for name in GROUPS:
        check_values(getattr(config, name))
    check_data(config.data)
    check_augmentation(config.augmentation, config.data)
    check_extra(config.extra)
    check_attack(config.attack)
    check_optim(config.optim)
    check_run(config.run, config.data)


def is_data_name(name: str) -> bool:
    """True for a dataset's name, data that `datasets` loads, and data of the user."""
    return name in DATASETS or is_hub_data(name) or is_user_supplied(name)


def check_data(data: DataConfig) -> None:
    """Raise UserError for an unknown dataset."""
    if not is_data_name(data.data):
        raise unknown_name("dataset", data.data, DATASETS)


def check_augmentation(augmentation: AugmentationConfig, data: DataConfig) -> None:
    """Raise UserError for an unknown policy, two kinds of crops, or an invalid range."""
    own_crop = parse_policy(augmentation.aa).own_crop
    if augmentation.crops and "crop" in data.augment:
        raise UserError(
            f"{augmentation.crops} crops the images itself; leave --augment {data.augment} out, or use "
            "--augment flip"
        )
    if augmentation.scale and own_crop:
        raise UserError(
            f"{augmentation.crops} and aa {augmentation.aa} both crop the images; leave one of them out"
        )
    for name, ends, most in (("scale", augmentation.scale, 1.0), ("ratio", augmentation.ratio, 100.0)):
        if ends and not (len(ends) == 2 and 0 < ends[0] <= ends[1] <= most):
            given = " ".join(f"{end:g}" for end in ends)
            raise UserError(
                f"{name} must be two numbers, above 0 and at most {most:g}, in ascending order, got {given}"
            )
    if not augmentation.ratio:
        raise UserError("ratio must be two numbers; leave it out for 3/4 4/3")


def check_extra(extra: ExtraConfig) -> None:
    """Raise UserError for a checksum of the wrong form."""
    if extra.extra_checksum is not None and not re.fullmatch(r"[0-9a-f]{16}", extra.extra_checksum):
        raise UserError(
            f"extra_checksum must be 16 hexadecimal digits, got {extra.extra_checksum!r}; `fastdynat pack` "
            "prints that of its images"
        )


def check_attack(attack: AttackConfig) -> None:
    """Raise UserError for radii and steps that cannot work."""
    check_radii(attack, attack.norm)
    check_norms(attack)
    steps = 1e6 if attack.steps is None else attack.steps
    if attack.early_steps is not None and not 0 <= attack.early_steps <= steps:
        raise UserError(f"early_steps must be between 0 and steps ({steps:g}), got {attack.early_steps}")


def check_norms(attack: AttackConfig) -> None:
    """Raise UserError for --norms and --norm-eps that cannot work, or that --norm contradicts."""
    norms = norms_of(attack)
    if attack.norms is None:
        return
    if len(norms) < 2 or len(set(norms)) < len(norms):
        raise UserError(
            f"norms must be two or more different norms, such as linf,l2,l1, got {attack.norms!r}; "
            "--norm takes one"
        )
    for norm in norms:
        if norm not in TRAINING_NORMS:
            raise unknown_name("norm of --norms", norm, TRAINING_NORMS)
    if attack.norm not in (AttackConfig.norm, norms[0]):
        raise UserError(f"norm {attack.norm} is not the first of --norms {attack.norms}; leave --norm out")
    if attack.norm_eps != "auto":
        radii = attack.norm_eps.split(",")
        if len(radii) != len(norms):
            raise UserError(
                f"norm_eps must be a radius for each of --norms {attack.norms}, got {attack.norm_eps!r}"
            )
        for norm, radius in zip(norms, map(str.strip, radii), strict=True):
            if radius != "auto":
                limit = 1.0 if norm == "linf" else L2_LIMIT
                parse_size(radius, f"norm_eps ({norm})", norm=norm, limit=limit)


def check_optim(optim: OptimConfig) -> None:
    """Raise UserError for options of the optimiser and the schedule that exclude each other."""
    most = math.inf if optim.epochs is None else optim.epochs
    if not 0 <= optim.burn_in < min(most, 1e6):
        below = "" if optim.epochs is None else f" ({optim.epochs})"
        raise UserError(f"burn_in must be a number of epochs below --epochs{below}, got {optim.burn_in}")
    check_average(optim)
    check_optimizer(optim)
    if not all(0 < m < 1 for m in optim.milestones):
        raise UserError(f"milestones must be shares of the run between 0 and 1, got {list(optim.milestones)}")
    if optim.warmup is not None and optim.schedule not in WARMUP:
        those = " or ".join(WARMUP)
        raise UserError(
            f"warmup {optim.warmup:g}: schedule {optim.schedule} has none; "
            f"leave it out, or use --schedule {those}"
        )
    check_warmup(optim)


def check_average(optim: OptimConfig) -> None:
    """Raise UserError for options of a missing weight average, and options that exclude each other."""
    usual = OptimConfig()
    for name in ("ema_warmup", "ema_buffers", "ema_every", "ema_from"):
        if optim.ema == 0 and not optim.swa and getattr(optim, name) != getattr(usual, name):
            raise UserError(
                f"{name} {getattr(optim, name)}: there is no weight average; "
                "turn it on with --ema 0.995, or leave this out"
            )
    if optim.swa and optim.ema > 0:
        raise UserError(f"swa and ema {optim.ema:g} are two kinds of weight average; leave one of them out")
    if optim.ema_warmup > 0 and (optim.swa or optim.ema_from > 0):
        other = "swa" if optim.swa else f"ema_from {optim.ema_from}"
        raise UserError(
            f"ema_warmup {optim.ema_warmup:g} and {other} both set when averaging starts; "
            "leave ema_warmup out, or --swa and --ema-from"
        )


def check_warmup(optim: OptimConfig) -> None:
    """Raise UserError for a linear warm-up or a final rate that the schedule does not have."""
    if optim.warmup_epochs > 0 and optim.schedule not in LINEAR_WARMUP:
        those = " or ".join(LINEAR_WARMUP)
        remedy = ", or --warmup, the share of its rise" if optim.schedule in WARMUP else ""
        raise UserError(
            f"warmup_epochs {optim.warmup_epochs:g}: schedule {optim.schedule} has no linear warm-up; "
            f"leave it out, or use --schedule {those}{remedy}"
        )
    if optim.warmup_epochs == 0 and (optim.warmup_lr is not None or optim.warmup_prefix):
        name = "warmup_prefix" if optim.warmup_lr is None else f"warmup_lr {optim.warmup_lr:g}"
        raise UserError(f"{name}: there is no warm-up; leave it out, or give --warmup-epochs")
    if optim.warmup_prefix and optim.schedule != "cosine":
        raise UserError(f"warmup_prefix is for --schedule cosine, not {optim.schedule}; leave it out")
    if optim.min_lr > 0 and optim.schedule not in FLOORED:
        those = " or ".join(FLOORED)
        raise UserError(
            f"min_lr {optim.min_lr:g} is for --schedule {those}, not {optim.schedule}; leave it out"
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
