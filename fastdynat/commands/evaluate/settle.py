"""The checks and choices of `fastdynat eval` that need torch."""

import logging
from dataclasses import replace
from typing import Any, cast

import torch

from fastdynat.commands.evaluate.columns import check_user_attacks, needs_float32
from fastdynat.config.eval_config import EvalConfig, Shard, check_eval_config, parse_shard
from fastdynat.tuning.devices import check_compile, check_kernels, pick_amp, pick_device

logger = logging.getLogger(__name__)


def check_eval_device(config: EvalConfig) -> torch.device:
    """Check what needs neither data nor networks; returns the device.

    Raises:
        UserError: a value that cannot work.
    """
    check_eval_config(config)
    device = pick_device(config.device)
    check_compile(config.compile, device)
    check_kernels(config.kernels, device)
    check_user_attacks(config.attacks)
    return device


def with_amp_chosen(config: EvalConfig) -> EvalConfig:
    """`config` with the precision that "auto" is on this machine, which is logged.

    "auto" is float32 where an attack is asked for that half precision might weaken.

    Raises:
        UserError: as `check_eval_device`.
    """
    slow = (
        needs_float32(config.attacks, "linf" if config.norm == "auto" else config.norm)
        if config.amp == "auto"
        else ""
    )
    if slow:
        check_eval_device(config)
        logger.info("--amp: %s was not shown to be as strong in half precision; computing in float32", slow)
        return replace(config, amp="off")
    amp, note = pick_amp(config.amp, check_eval_device(config))
    if note:
        logger.info(note)
    return replace(config, amp=cast(Any, amp))


__all__ = ["EvalConfig", "Shard", "check_eval_device", "parse_shard", "with_amp_chosen"]
