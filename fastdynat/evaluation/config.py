"""What `fastdynat eval` is asked, checked where torch is at hand."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch

from fastdynat.config import check_seed
from fastdynat.devices import check_compile, check_kernels, pick_amp, pick_device
from fastdynat.errors import UserError
from fastdynat.eval_config import EvalConfig, Shard, parse_shard
from fastdynat.limits import MAX_IMAGE_SIZE, check_limits


def check_config(config: EvalConfig) -> torch.device:
    """Check what needs neither data nor networks; returns the device.

    Raises:
        UserError: a value that cannot work.
    """
    check_seed(config.seed)
    check_limits(config)
    if config.image_size is not None and not 1 <= config.image_size <= MAX_IMAGE_SIZE:
        raise UserError(f"image_size must be between 1 and {MAX_IMAGE_SIZE} pixels, got {config.image_size}")
    if config.batch_size < 1 or (config.num_images is not None and config.num_images < 1):
        raise UserError(f"batch_size and num_images must be >= 1, got {config.batch_size} and {config.num_images}")
    parse_shard(config.shard)
    device = pick_device(config.device)
    check_compile(config.compile, device)
    check_kernels(config.kernels, device)
    return device


def settled(config: EvalConfig, say: Callable[[str], None]) -> EvalConfig:
    """`config` with the precision that "auto" is on this machine, which `say` is told.

    Raises:
        UserError: as `check_config`.
    """
    return replace(config, amp=cast(Any, pick_amp(config.amp, check_config(config), say)))


__all__ = ["EvalConfig", "Shard", "check_config", "parse_shard", "settled"]
