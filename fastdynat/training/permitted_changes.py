"""Configuration changes permitted on resume: those under which the run so far would have been identical."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastdynat.config import TrainConfig
from fastdynat.data import DatasetInfo
from fastdynat.errors import UserError
from fastdynat.methods import method_class, method_label
from fastdynat.models.state_digest import state_digest
from fastdynat.runs import CONFIG
from fastdynat.training.resolved_config import ResolvedConfig
from fastdynat.training.schedules import attack_steps, epochs_of_method, schedule_factor
from fastdynat.training.training_state import fixed_settings


def check_changes(stored: TrainConfig[Any], asked: ResolvedConfig[Any]) -> None:
    """Refuse another value of what a run keeps for life. `stored` is what its config.yaml says."""
    before, after = fixed_settings(stored), fixed_settings(asked)
    for key, value in before.items():
        if value != after.get(key):
            raise changed_key(key, value, after.get(key))


def changed_key(key: str, before: object, after: object) -> UserError:
    """The refusal of another value of `key`."""
    return UserError(
        f"--resume continues a run exactly as it began: {key} is {before} in this run, not {after}; "
        "start a new run to change it"
    )


def check_trained(
    path: Path, stored: TrainConfig[Any], asked: TrainConfig[Any], state: dict[str, Any]
) -> None:
    """Refuse a last epoch that the run in `path` has passed; `state` is that of its newest checkpoint."""
    epoch, end = state.get("epoch", 0), asked.optim.epochs
    if end != stored.optim.epochs and end is not None and isinstance(epoch, int) and end <= epoch:
        raise UserError(
            f"{path} has already trained {epoch} epochs: --epochs must be >= {epoch + 1} to go on, got {end}"
        )


def stored_epochs(path: Path, stored: TrainConfig[Any]) -> int:
    """The number of epochs of the run in `path`. Raises UserError where its config.yaml has lost it."""
    if stored.optim.epochs is None:
        raise UserError(
            f"{path / CONFIG} has no epochs: it was edited; write the number of epochs of the run"
        )
    return stored.optim.epochs


def check_epochs(config: ResolvedConfig[Any], before: int, steps_per_epoch: int, info: DatasetInfo) -> None:
    """Refuse `config` for a run of `before` epochs, unless the schedules so far are the same under both."""
    now = config.optim.epochs
    if before == now:
        return
    old = replace(config, optim=replace(config.optim, epochs=before))
    epochs = range(min(before, now))
    numbers = f"on the number of epochs ({before} in this run, {now} asked)"
    if _attack_steps(old, epochs) != _attack_steps(config, epochs):
        raise UserError(
            f"--early-share depends {numbers}, and other epochs would have had fewer attack steps; "
            "keep --epochs"
        )
    if config.optim.ema_warmup > 0:
        raise UserError(f"--ema-warmup depends {numbers}; keep --epochs")
    values = (_epoch_values(c, epochs, info) for c in (old, config))
    if any(value != other for value, other in zip(*values, strict=True)):
        raise UserError(
            f"the loss of method {method_label(config.method)} changes over the run and depends {numbers}; "
            "keep --epochs"
        )
    factors = [schedule_factor(c.optim, steps_per_epoch) for c in (old, config)]
    if any(factors[0](step) != factors[1](step) for step in range(len(epochs) * steps_per_epoch)):
        raise UserError(
            f"the {config.optim.schedule} schedule depends {numbers}; "
            f"start with --epochs {now} --stop-after {before} to pause"
        )


def _attack_steps(config: ResolvedConfig[Any], epochs: range) -> list[int]:
    steps_at = attack_steps(config.attack, epochs_of_method(config.optim))
    return [steps_at(epoch) for epoch in epochs]


def _epoch_values(
    config: ResolvedConfig[Any], epochs: range, info: DatasetInfo
) -> Iterator[tuple[tuple[float, ...], str]]:
    """For each of `epochs`, what the method computes from the epoch: constants, digest of its buffers.

    The buffers are those of one image and an untrained run: they differ only by what `begin_epoch` writes.
    """
    method = method_class(config.method)(config.options)
    method.num_classes, method.num_images = info.num_classes, 1
    method.epochs = epochs_of_method(config.optim)
    method.buffers = method.make_buffers(torch.zeros(1, *info.image_shape))
    for epoch in epochs:
        method.epoch = max(0, epoch - config.optim.burn_in)
        with torch.random.fork_rng(devices=[]):  # what it draws there differs between epochs only
            torch.manual_seed(epoch)
            method.begin_epoch()
        yield method.constants(), state_digest(method.buffers)
