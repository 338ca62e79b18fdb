"""What `fastdynat eval` is asked, checked where torch is at hand."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch

from fastdynat.commands.evaluate.columns import check_user_attacks, needs_float32
from fastdynat.config.evaluation import EvalConfig, Shard, check_eval, parse_shard
from fastdynat.tuning.devices import check_compile, check_kernels, pick_amp, pick_device


def check_config(config: EvalConfig) -> torch.device:
    """Check what needs neither data nor networks; returns the device.

    Raises:
        UserError: a value that cannot work.
    """
    check_eval(config)
    device = pick_device(config.device)
    check_compile(config.compile, device)
    check_kernels(config.kernels, device)
    check_user_attacks(config.attacks)
    return device


def settled(config: EvalConfig, say: Callable[[str], None]) -> EvalConfig:
    """`config` with the precision that "auto" is on this machine, which `say` is told.

    "auto" is float32 where an attack is asked for that half precision might weaken.

    Raises:
        UserError: as `check_config`.
    """
    slow = (
        needs_float32(config.attacks, "linf" if config.norm == "auto" else config.norm)
        if config.amp == "auto"
        else ""
    )
    if slow:
        check_config(config)
        say(f"--amp: {slow} in half precision is not shown to be as strong; computing in float32")
        return replace(config, amp="off")
    return replace(config, amp=cast(Any, pick_amp(config.amp, check_config(config), say)))


__all__ = ["EvalConfig", "Shard", "check_config", "parse_shard", "settled"]
