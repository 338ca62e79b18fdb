"""Resuming a run: it goes on exactly, or a refusal leaves it as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastdynat.config import TrainConfig, to_yaml
from fastdynat.errors import UserError
from fastdynat.execution.process_state import keeping_process_state
from fastdynat.methods.configs import stored_config
from fastdynat.ops import use_backend
from fastdynat.runs import ENVIRONMENT, STATE, RunDir, check_manifest, newest_checkpoint, record_start
from fastdynat.training.arithmetic import arithmetic, rounding_of_resume
from fastdynat.training.parts import build_parts, burn_in_step, open_split
from fastdynat.training.permitted_changes import changed_key, check_changes, check_epochs, check_trained
from fastdynat.training.resolve import Say, adopted, resolve, resolve_loader
from fastdynat.training.state import read_state
from fastdynat.training.trainer import Trainer
from fastdynat.training.weight_files import load_weights


@keeping_process_state
@contextmanager
def resumed_run(path: Path, config: TrainConfig[Any], say: Say) -> Iterator[Trainer]:
    """A trainer that goes on from the last checkpoint in `path`; `config` is the stored one with permitted
    changes.

    Raises:
        UserError: a change that would break exactness, or a checkpoint that is damaged or belongs to
            something else.
    """
    stored, run = stored_config(path), RunDir.open(path)
    try:
        last = newest_checkpoint(path)
        state = {} if last is None else _checked_state(last)
        if config.data.data != stored.data.data:  # before the other data is looked for
            raise UserError(changed_key("data", stored.data.data, config.data.data))
        check_trained(path, stored, config, state)
        split = open_split(config, say)
        config = replace(config, engine=adopted(config.engine, stored.engine))
        resolved = resolve(config, split.info, lambda text: None, carried_on=True)
        config = resolve_loader(resolved, split, lambda text: None)
        check_changes(stored, config)
        val = split.val_images()
        networks, step, loader = build_parts(config, split, say, guide_comes=last is not None)
        check_epochs(stored, config, loader.steps_per_epoch)
        trainer = Trainer(
            config, split.info, val, networks, step, loader, run, burn_in_step(config, step, say)
        )
        if last is None:
            trainer.metrics.restore(0, None)
            say(f"{path} was stopped before its first checkpoint: starting again from the same seed")
        else:
            _restore(last, state, trainer)
            if trainer.finished():
                say(_how_to_go_on(path, trainer, loader.steps_per_epoch))
                yield trainer
                return
            say(
                f"resuming {path} at epoch {trainer.epoch + 1}, step {trainer.epoch_step}/{loader.steps_per_epoch}"
            )
        if config.engine.device != stored.engine.device:
            say(
                f"the run moves from {stored.engine.device} to {config.engine.device}: it continues, but not bit for bit"
            )
        elif why := rounding_of_resume(config.engine):
            say(f"it continues within rounding, not bit for bit: {why}")
        # Only now, when nothing can be refused any more, does the run's own record change.
        run.adopt()
        run.rewrite_config(to_yaml(replace(config, run=replace(config.run, stop_after=None))))
        run.checkpoints.link()
        with use_backend(config.engine.kernels):
            for change in record_start(path / ENVIRONMENT, **arithmetic(config.engine)):
                say(f"{change}: the run continues, but not bit for bit")
            yield trainer
    finally:
        run.close()


def _checked_state(checkpoint: Path) -> dict[str, Any]:
    check_manifest(checkpoint)
    return read_state(checkpoint / STATE)


def _restore(checkpoint: Path, state: dict[str, Any], trainer: Trainer) -> None:
    load_weights(checkpoint, trainer.networks, trainer.config)
    try:
        trainer.load_state_dict(state)
        _check_momentum(trainer)
    except UserError:
        raise
    except (
        Exception
    ) as error:  # a tensor or a value of another kind fails in its own way; nothing has been written
        raise UserError(
            f"{checkpoint / STATE} does not fit this run: {' '.join(str(error).split())}"
        ) from None


def _check_momentum(trainer: Trainer) -> None:
    for optimizer in trainer.step.optimizers:
        for parameter, kept in optimizer.state.items():
            shapes = {name: tuple(value.shape) for name, value in kept.items() if torch.is_tensor(value)}
            for name, shape in shapes.items():
                if shape not in (tuple(parameter.shape), ()):
                    raise ValueError(f"{name} of a weight {tuple(parameter.shape)} is {shape}")


def _how_to_go_on(path: Path, trainer: Trainer, steps_per_epoch: int) -> str:
    """That the run is finished, and what would make it longer."""
    config, epochs = trainer.config, trainer.epoch
    done = f"{path} is finished after {epochs} epochs"
    if why := trainer.watch.ended():
        return f"{done}: {why}; another --stop-at, --patience or --on-collapse lets it go on"
    longer = replace(config, optim=replace(config.optim, epochs=epochs + 1))
    try:
        check_epochs(config, longer, steps_per_epoch)
    except UserError:
        return f"{done}, where its schedule ends: to train longer, start a new run with more --epochs"
    return f"{done}: to train longer, resume it with --epochs {epochs + 1} or more"
