"""Resuming a run: it continues exactly, or a refusal leaves it as it was."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastdynat.attack_engine.network_modes import has_batch_norm
from fastdynat.config import TrainConfig, to_yaml
from fastdynat.data import TrainSplit
from fastdynat.distributed import all_can, first_decides, world
from fastdynat.errors import UserError
from fastdynat.execution.process_state import keeping_process_state
from fastdynat.methods.configs import stored_config
from fastdynat.ops import use_backend
from fastdynat.runs import (
    ENVIRONMENT,
    STATE,
    RunDir,
    SeenRun,
    check_manifest,
    check_test_images,
    newest_checkpoint,
    read_sidecar,
    record_start,
)
from fastdynat.runs.environment import read_starts
from fastdynat.training.arithmetic import arithmetic, rounding_of_resume
from fastdynat.training.optimizers import local_part
from fastdynat.training.own_code import pin_own_code, refuse_changed_code
from fastdynat.training.parts import build_parts, burn_in_step, open_split
from fastdynat.training.permitted_changes import (
    changed_key,
    check_changes,
    check_epochs,
    check_trained,
    stored_epochs,
)
from fastdynat.training.rank_start import (
    begin_alike,
    require_same_command,
    require_shared_folder,
    settled_by_first,
)
from fastdynat.training.resolve import resolve, resolve_loader
from fastdynat.training.resolve_engine import with_stored_choices
from fastdynat.training.resolved_config import ResolvedConfig
from fastdynat.training.trainer import Trainer
from fastdynat.training.training_state import read_training_state
from fastdynat.training.weight_files import load_weights
from fastdynat.user_code import without_place

logger = logging.getLogger(__name__)


@keeping_process_state
@contextmanager
def resumed_run(path: Path, config: TrainConfig[Any], *, lock_seconds: float = 0.0) -> Iterator[Trainer]:
    """A trainer that continues from the last checkpoint in `path`.

    Args:
        config: the stored configuration with permitted changes.
        lock_seconds: to wait for another process that uses the run.

    Raises:
        UserError: a change that would break exactness, other test images, or a checkpoint that is damaged
            or belongs to another run.
    """
    config, stored = pin_own_code(config), stored_config(path, config.method)
    refuse_changed_code(stored, config)
    require_same_command(config)
    run = _opened(path, lock_seconds)
    try:
        trainer = _restored_trainer(run, stored, config)
        if trainer.finished():
            logger.info(_how_to_train_longer(path, trainer))
            yield trainer
            return
        engine = trainer.config.engine
        if engine.device != stored.engine.device:
            logger.info(
                "the run moves from %s to %s: it continues, but not bit for bit",
                stored.engine.device,
                engine.device,
            )
        elif why := rounding_of_resume(engine):
            logger.info("it continues within rounding, not bit for bit: %s", why)
        with use_backend(engine.kernels):
            if isinstance(run, RunDir):
                _rewrite_record(run, trainer, stored)  # only now, when nothing can be refused any more
            yield trainer
    finally:
        run.close()


def _opened(path: Path, lock_seconds: float) -> RunDir | SeenRun:
    """The run in `path`, opened by the process that writes it, which all others see."""
    opened: list[RunDir] = []
    first_decides(lambda: opened.append(RunDir.open(path, lock_seconds=lock_seconds)))
    run = opened[0] if opened else SeenRun(path)
    try:
        require_shared_folder(path)
    except BaseException:
        run.close()
        raise
    return run


def _restored_trainer(run: RunDir | SeenRun, stored: TrainConfig[Any], asked: TrainConfig[Any]) -> Trainer:
    """A trainer in the state of the newest checkpoint of `run`, whose files stay as they are.

    Of several processes the first reads the checkpoint; the others get weights and state from it.
    """
    found: list[tuple[Path | None, dict[str, Any]]] = []

    def settle() -> tuple[ResolvedConfig[Any], TrainSplit]:
        last = newest_checkpoint(run.path)
        state = {} if last is None else _checked_state(last)
        found.append((last, state))
        config, split = _settled(run.path, stored, asked, state)
        if last is not None:  # the next checkpoint would name the images made now as the run's test images
            check_test_images(read_sidecar(last / "model.safetensors")[0], split.info, str(run.path))
        return config, split

    config, split = settled_by_first(asked, settle)
    last, state = world().from_first(found[0] if found else (None, {}))
    val = all_can(split.val_images)
    parts = all_can(lambda: build_parts(config, split, load_sources=last is None and world().first))
    check_epochs(config, stored_epochs(run.path, stored), parts.loader.steps_per_epoch, split.info)
    trainer = Trainer(config, split.info, val, parts, run, burn_in_step(config, parts.step))
    all_can(lambda: _restore(last, state, trainer))
    begin_alike(parts, val)
    if last is None:
        logger.info("%s was stopped before its first checkpoint: starting again from the same seed", run.path)
    elif not trainer.finished():
        logger.info("resuming %s %s", run.path, _place(trainer))
    return trainer


def _settled(
    path: Path, stored: TrainConfig[Any], asked: TrainConfig[Any], state: dict[str, Any]
) -> tuple[ResolvedConfig[Any], TrainSplit]:
    """The configuration to go on with, and its data; `state` is that of the newest checkpoint in `path`."""
    if without_place(asked.data.data) != without_place(
        stored.data.data
    ):  # before the other data is looked for
        raise changed_key("data", stored.data.data, asked.data.data)
    check_trained(path, stored, asked, state)
    split = open_split(asked)
    asked = replace(asked, engine=with_stored_choices(asked.engine, stored.engine))
    if asked.model.sync_bn == "auto":  # the number of processes may be another one now
        asked = replace(asked, model=replace(asked.model, sync_bn=stored.model.sync_bn))
    resolved = resolve(asked, split.info, announce=False, carried_on=True)
    config = resolve_loader(resolved, split, announce=False)
    check_changes(stored, config)
    return config, split


def _checked_state(checkpoint: Path) -> dict[str, Any]:
    check_manifest(checkpoint)
    return read_training_state(checkpoint / STATE)


def _restore(checkpoint: Path | None, state: dict[str, Any], trainer: Trainer) -> None:
    """Load the checkpoint's weights, in the process that writes, and its `state`; None is the beginning."""
    if checkpoint is None:
        trainer.restore_metrics(0, None)
        return
    if world().first:
        load_weights(checkpoint, trainer.networks, trainer.config)
    try:
        trainer.load_state_dict(state)
        _check_momentum(trainer)
    except UserError:
        raise
    # A tensor or a value of another kind fails in its own way; nothing has been written yet.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{checkpoint / STATE} does not fit this run: {reason}") from None


def _check_momentum(trainer: Trainer) -> None:
    for optimizer in trainer.step.optimizers:
        for parameter, kept in local_part(optimizer).state.items():
            shapes = {name: tuple(value.shape) for name, value in kept.items() if torch.is_tensor(value)}
            for name, shape in shapes.items():
                if shape not in (tuple(parameter.shape), ()):
                    raise ValueError(f"{name} of a weight {tuple(parameter.shape)} is {shape}")


def _place(trainer: Trainer) -> str:
    """The point where training continues, in words."""
    epoch, step, steps = trainer.epoch, trainer.epoch_step, trainer.loader.steps_per_epoch
    if step == 0:
        return f"after epoch {epoch}"
    if step == steps:
        return f"at the end of epoch {epoch + 1}, before its validation"
    return f"at epoch {epoch + 1}, after {step} of {steps} steps"


def _rewrite_record(run: RunDir, trainer: Trainer, stored: TrainConfig[Any]) -> None:
    """Bring the run directory up to date: present form, present configuration, links, this start.

    stored: the configuration of the run so far.
    """
    config = trainer.config
    run.adopt()
    run.rewrite_config(to_yaml(replace(config, run=replace(config.run, stop_after=None))))
    run.checkpoints.link()
    about = arithmetic(config.engine)
    with suppress(UserError):  # no list, or a damaged one, which resuming does not need
        processes = read_starts(run.path / ENVIRONMENT)[-1].get("processes", 1)
        _warn_of_statistics(processes, stored.optim.grad_accum_steps, trainer)
    for change in record_start(run.path / ENVIRONMENT, processes=trainer.world.size, **about):
        logger.info("%s: the run continues, but not bit for bit", change)


def _warn_of_statistics(processes: int, micro_batches: int, trainer: Trainer) -> None:
    """Warn where batch norm sees another part of a batch than before.

    processes, micro_batches: of the run so far; with --sync-bn on the number of processes does not matter.
    """
    config, networks = trainer.config, trainer.networks.raw
    off = config.model.sync_bn == "off"
    before = (processes if off else 1, micro_batches)
    now = (trainer.world.size if off else 1, config.optim.grad_accum_steps)
    trained = [networks[name] for name in trainer.step.method.trains]
    if before == now or not any(map(has_batch_norm, trained)):
        return
    remedies = [f"--grad-accum-steps {micro_batches}"] * (before[1] != now[1])
    remedies += [f"{processes} process(es)"] * (before[0] != now[0])
    logger.warning(
        "%sbatch norm statistics are computed over 1/%d of a batch, where the run so far used 1/%d, so "
        "training goes on differently; %s would avoid this",
        "--sync-bn off: " * off,
        now[0] * now[1],
        before[0] * before[1],
        " and ".join(remedies),
    )


def _how_to_train_longer(path: Path, trainer: Trainer) -> str:
    """The message for a finished run, with the options that would make it longer."""
    config, epochs = trainer.config, trainer.epoch
    done = f"{path} is finished after {epochs} epochs"
    if why := trainer.watch.ended():
        return f"{done}: {why}; change --stop-at, --patience or --on-collapse to continue"
    longer = replace(config, optim=replace(config.optim, epochs=epochs + 1))
    try:
        check_epochs(longer, config.optim.epochs, trainer.loader.steps_per_epoch, trainer.info)
    except UserError:
        return f"{done}, where its schedule ends: to train longer, start a new run with more --epochs"
    return f"{done}: to train longer, resume it with --epochs {epochs + 1} or more"
