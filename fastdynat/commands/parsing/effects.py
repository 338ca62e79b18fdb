"""Refusal of flags that have no effect next to the others, with the reason."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from fastdynat.config import GROUPS, TrainConfig
from fastdynat.errors import UserError
from fastdynat.methods.options import MethodOptions
from fastdynat.user_code import is_hub_data, is_user_supplied, short_name


def check_effects(config: TrainConfig[Any], given: Iterable[str]) -> None:
    """Raise UserError for the first of the flags `given` without effect, unless at its default."""
    idle, defaults = idle_keys(config), defaults_of(config)
    for flag in sorted(given):
        key = flag.removeprefix("--").replace("-", "_")
        value, default = value_of(config, key), defaults.get(key)
        if key in idle and value != default:
            raise UserError(f"{flag} has no effect: {idle[key]}")


def idle_keys(config: TrainConfig[Any]) -> dict[str, str]:
    """The keys of `config` without effect next to the others, with reasons; needs no data."""
    data, attack, optim, augmentation = config.data, config.attack, config.optim, config.augmentation
    found = dict(config.options.idle()) if isinstance(config.options, MethodOptions) else {}
    if data.data == "digits":
        found |= dict.fromkeys(("data_dir", "download"), "--data digits is embedded")
    if is_user_supplied(data.data):
        own = f"--data {short_name(data.data)} brings its images"
        found |= dict.fromkeys(("data_dir", "download", "image_size"), own)
    if is_hub_data(data.data):
        found["data_dir"] = f"--data {data.data} names its folder"
    if data.data == "imagefolder":
        found["download"] = "--data imagefolder is a folder of yours"
    if config.extra.extra_data is None:
        without = {"extra_data"} | ({"extra_share"} if config.extra.extra_share == 0 else set())
        extra = (field.name for field in fields(config.extra) if field.name not in without)
        found |= dict.fromkeys(extra, "needs --extra-data")
    elif config.extra.extra_share > 0:
        found["drop_last"] = "with --extra-data every batch is full"
    if data.loader == "resident":
        found["workers"] = "--loader resident has none; it is for --loader torch and dali"
    if not augmentation.scale:
        found["ratio"] = "needs --scale"
    if augmentation.reprob == 0:
        found["remode"] = "needs --reprob"
    if augmentation.mixup == 0 or augmentation.cutmix == 0:
        found["mixup_switch_prob"] = "needs both --mixup and --cutmix"
    if augmentation.mixup == augmentation.cutmix == 0:
        found |= dict.fromkeys(("mixup_prob", "mixup_groups"), "needs --mixup or --cutmix")
    elif augmentation.mixup_prob == 0:
        mixing = ("mixup", "cutmix", "mixup_groups", "mixup_switch_prob")
        found |= dict.fromkeys(mixing, "--mixup-prob 0 mixes no batch")
    if attack.attack == "apgd":
        found["step_size"] = "--attack apgd chooses its own, from 2 eps down"
    if config.model.init_from is None:
        found["init_sha256"] = "needs --init-from"
    if attack.norms is None:
        found |= dict.fromkeys(("norm_choice", "norm_eps"), "needs --norms")
    if attack.eps_ramp == 0 and not attack.step_ramp:
        found |= dict.fromkeys(("ramp_by", "ramp_from_zero"), "needs --eps-ramp or --step-ramp")
    if attack.early_steps is None:
        found["early_share"] = "needs --early-steps"
    elif attack.early_share == 0:
        found["early_steps"] = "--early-share 0 gives them no epoch"
    elif attack.early_steps == attack.steps:
        found["early_steps"] = "--steps is the same"
    if attack.awp == 0:
        found |= dict.fromkeys(("awp_warmup", "awp_objective"), "needs --awp")
    if optim.weight_decay == 0:
        found |= dict.fromkeys(("decay_exempt", "decay_norms"), "--weight-decay 0 decays nothing")
    if optim.schedule != "multistep":
        found |= dict.fromkeys(
            ("milestones", "gamma"), f"--schedule {optim.schedule} has none; it is for --schedule multistep"
        )
    if optim.schedule not in ("cosine", "onecycle", "triangular") and optim.warmup_epochs == 0:
        found["schedule_by"] = f"it is for --schedule cosine, onecycle and triangular, not {optim.schedule}"
    if optim.schedule == "constant":
        found["schedule_ahead"] = "--schedule constant is the same at every update"
        found["schedule_epochs"] = "--schedule constant is the same in every epoch"
    if data.val_size == 0:
        found |= dict.fromkeys(
            ("val_every", "check_fidelity", "boundary_speed"), "--val-size 0 leaves nothing to validate on"
        )
    return found


def value_of(config: TrainConfig[Any], key: str) -> Any:
    """The value of `key` in `config`; None for a key that it does not have."""
    return next((getattr(p, key) for p in _parts(config) if hasattr(p, key)), None)


def _parts(config: TrainConfig[Any]) -> tuple[Any, ...]:
    return (*(getattr(config, name) for name in GROUPS), config.options)


def defaults_of(config: TrainConfig[Any]) -> dict[str, Any]:
    """The default of each key of `config`."""
    return {field.name: field.default for part in _parts(config) for field in fields(part)}
