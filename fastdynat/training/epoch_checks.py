"""Optional measurements at each validation, which change nothing in the run: fidelity, boundary speed."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.data import Batch, Images, eval_batches
from fastdynat.evaluation.fidelity import check_fidelity
from fastdynat.training.boundary_log import log_boundary
from fastdynat.training.networks import NetworkSet
from fastdynat.training.resolved_config import ResolvedConfig
from fastdynat.training.step import TrainStep

logger = logging.getLogger(__name__)


def fidelity_columns(
    config: ResolvedConfig[Any], networks: NetworkSet, spec: PGDSpec, val: Images
) -> dict[str, float | bool]:
    """--check-fidelity N: strength of the fast attack against the eager float32 one, on N images of `val`."""
    count = config.engine.check_fidelity
    if count == 0:
        return {}
    found = check_fidelity(
        networks.attack,
        networks.raw["model"],
        ((batch.x, batch.labels) for batch in _some(val, count, config)),
        spec,
        bn=config.attack.attack_bn,
        seed=config.engine.seed,
    )
    if found.weaker:
        logger.warning(
            "the attack is weaker than the eager float32 one: loss %.4g against %.4g, "
            "accuracy %.1f against %.1f %%; it is computed as %s",
            found.loss_fast,
            found.loss_reference,
            100 * found.acc_fast,
            100 * found.acc_reference,
            networks.attack.path,
        )
    return found.columns()


def boundary_columns(
    config: ResolvedConfig[Any], step: TrainStep, val: Images, folder: Path, epoch: int
) -> dict[str, float | None]:
    """--boundary-speed N: movement of the decision boundary of N images of `val`, after `epoch` epochs."""
    count = config.engine.boundary_speed
    if count == 0:
        return {}
    near, seed = config.attack.eval_eps, config.engine.seed
    return log_boundary(step, _some(val, count, config), folder, epoch, near=near, seed=seed)


def _some(val: Images, count: int, config: ResolvedConfig[Any]) -> Iterator[Batch]:
    """`count` validation images in batches of the training's size, which is the shape that is compiled."""
    spread = torch.arange(count) * len(val) // count  # a folder's images may be in the order of their classes
    return eval_batches(
        val.part(spread),
        batch_size=config.data.batch_size,
        device=torch.device(config.engine.device),
        channels_last=config.engine.channels_last == "on",
    )
