"""Starting and resuming runs: everything is checked before anything is written, and nothing is lost by a refusal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from fastdynat.attacks import AttackSwitches, PGDSpec
from fastdynat.config import EngineConfig, ModelConfig, TrainConfig, to_yaml
from fastdynat.data import DatasetInfo, TrainLoader, TrainSplit, dataset_info, make_loader, open_train
from fastdynat.devices import AMP_DTYPES
from fastdynat.engine.awp import WeightPerturbation
from fastdynat.engine.networks import NetworkSet, pixel_statistics
from fastdynat.engine.precision import Precision
from fastdynat.engine.resolve import (
    Say,
    adopted,
    check_sizes,
    resolve,
    resolve_loader,
    say_first_epoch,
    use_graphs,
    use_guide_stream,
)
from fastdynat.engine.rng import seed_everything
from fastdynat.engine.schedules import epochs_of_method, momentum_at, schedule_factor
from fastdynat.engine.single_values import check_single_values
from fastdynat.engine.state import identity, read_state
from fastdynat.engine.step import TrainStep
from fastdynat.engine.trainer import Trainer
from fastdynat.engine.trial import settle_compile
from fastdynat.errors import UserError
from fastdynat.graphs import CudaRecorder
from fastdynat.methods import BurnIn, Method, method_class
from fastdynat.methods.configs import stored_config
from fastdynat.models import build_model
from fastdynat.models.finite import check_numbers
from fastdynat.ops import selected_backend, use_backend
from fastdynat.process_state import keeping_process_state
from fastdynat.runs import (
    ENVIRONMENT,
    STATE,
    RunDir,
    check_manifest,
    check_new,
    claim_name,
    foreign,
    free_name,
    guide_weights,
    load_network,
    load_state,
    newest_checkpoint,
    put_state,
    record_start,
    release_name,
)


@keeping_process_state
@contextmanager
def new_run(config: TrainConfig[Any], say: Say) -> Iterator[Trainer]:
    """A trainer for a new run directory, ready to `fit`.

    Raises:
        UserError: anything in `config`, the data or the directory that cannot work; nothing has been written then.
    """
    known = dataset_info(config.data.data)
    if known is not None:
        resolve(config, known, lambda text: None)  # refuse before the data is read, where that is possible
    stem = f"{config.data.data}-{config.method}"
    path = Path(config.run.run_dir) if config.run.run_dir else free_name(stem)
    check_new(path, overwrite=config.run.overwrite)
    overwrite = config.run.overwrite
    teacher = config.model.guide_from
    if overwrite and teacher is not None and Path(teacher).resolve().is_relative_to(path.resolve()):
        raise UserError(f"--guide-from {teacher} is in the run that --overwrite would replace; choose another --run-dir")
    split = open_split(config, say)
    check_sizes(config, split)
    config = resolve_loader(resolve(config, split.info, say), split, say)
    say_first_epoch(config, say)
    val = split.val_images()
    config = settle_compile(config, split, say, build_parts)
    parts = build_parts(config, split, say)
    burn_in = burn_in_step(config, parts[1], say)
    claimed = not config.run.run_dir
    if claimed:
        path = claim_name(stem)  # only now, when nothing can be refused any more
    # The data folder is stored whole, so that a run can be resumed and evaluated from elsewhere.
    config = replace(
        config,
        run=replace(config.run, run_dir=str(path), overwrite=False),
        data=replace(config.data, data_dir=str(Path(config.data.data_dir).absolute())),
    )
    try:
        run = RunDir.create(path, to_yaml(config), overwrite=overwrite)
    except BaseException:
        if claimed:
            release_name(path)
        raise
    for kept in run.kept:
        say(f"--overwrite leaves {kept}, which the old run did not make")
    try:
        with use_backend(config.engine.kernels):
            record_start(path / ENVIRONMENT, operators=selected_backend(torch.device(config.engine.device).type))
            yield Trainer(config, split.info, val, *parts, run, burn_in)
    finally:
        run.close()


@keeping_process_state
@contextmanager
def resumed_run(path: Path, config: TrainConfig[Any], say: Say) -> Iterator[Trainer]:
    """A trainer that goes on from the last checkpoint in `path`; `config` is the stored one with permitted changes.

    Raises:
        UserError: a change that would break exactness, or a checkpoint that is damaged or belongs to something else.
    """
    stored, run = stored_config(path), RunDir.open(path)
    try:
        last = newest_checkpoint(path)
        state = {} if last is None else _checked_state(last)
        if config.data.data != stored.data.data:  # before the other data is looked for
            raise UserError(_changed("data", stored.data.data, config.data.data))
        _check_trained(path, stored, config, state)
        split = open_split(config, say)
        config = replace(config, engine=adopted(config.engine, stored.engine))
        resolved = resolve(config, split.info, lambda text: None, carried_on=True)
        config = resolve_loader(resolved, split, lambda text: None)
        _check_changes(stored, config)
        val = split.val_images()
        networks, step, loader = build_parts(config, split, say, guide_comes=last is not None)
        _check_epochs(stored, config, loader.steps_per_epoch)
        trainer = Trainer(config, split.info, val, networks, step, loader, run, burn_in_step(config, step, say))
        if last is None:
            trainer.metrics.restore(0, None)
            say(f"{path} was stopped before its first checkpoint: starting again from the same seed")
        else:
            _restore(last, state, trainer)
            if trainer.finished():
                say(_how_to_go_on(path, trainer, loader.steps_per_epoch))
                yield trainer
                return
            say(f"resuming {path} at epoch {trainer.epoch + 1}, step {trainer.epoch_step}/{loader.steps_per_epoch}")
        if config.engine.device != stored.engine.device:
            say(f"the run moves from {stored.engine.device} to {config.engine.device}: it goes on, but not bit for bit")
        # Only now, when nothing can be refused any more, does the run's own record change.
        run.adopt()
        run.rewrite_config(to_yaml(replace(config, run=replace(config.run, stop_after=None))))
        run.checkpoints.link()
        with use_backend(config.engine.kernels):
            now = selected_backend(torch.device(config.engine.device).type)
            for change in record_start(path / ENVIRONMENT, operators=now, on_cpu=not config.engine.device.startswith("cuda")):
                say(f"{change}: the run goes on, not bit for bit")
            yield trainer
    finally:
        run.close()


def _checked_state(checkpoint: Path) -> dict[str, Any]:
    check_manifest(checkpoint)
    return read_state(checkpoint / STATE)


def _restore(checkpoint: Path, state: dict[str, Any], trainer: Trainer) -> None:
    _load_weights(checkpoint, trainer.networks, trainer.config)
    try:
        trainer.load_state_dict(state)
        _check_momentum(trainer)
    except UserError:
        raise
    except Exception as error:  # a tensor or a value of another kind fails in its own way; nothing has been written
        raise UserError(f"{checkpoint / STATE} does not fit this run: {' '.join(str(error).split())}") from None


def _check_momentum(trainer: Trainer) -> None:
    for optimizer in trainer.step.optimizers:
        for parameter, kept in optimizer.state.items():
            shapes = {name: tuple(value.shape) for name, value in kept.items() if torch.is_tensor(value)}
            for name, shape in shapes.items():
                if shape not in (tuple(parameter.shape), ()):
                    raise ValueError(f"{name} of a weight {tuple(parameter.shape)} is {shape}")


def _check_trained(path: Path, stored: TrainConfig[Any], asked: TrainConfig[Any], state: dict[str, Any]) -> None:
    """Refuse to end where the run has been already. `state`: of its newest checkpoint."""
    epoch, end = state.get("epoch", 0), asked.optim.epochs
    if end != stored.optim.epochs and end is not None and isinstance(epoch, int) and end <= epoch:
        raise UserError(f"{path} has already trained {epoch} epochs: --epochs must be >= {epoch + 1} to go on, got {end}")


def _how_to_go_on(path: Path, trainer: Trainer, steps_per_epoch: int) -> str:
    """That the run is finished, and what would make it longer."""
    config, epochs = trainer.config, trainer.epoch
    done = f"{path} is finished after {epochs} epochs"
    if why := trainer.watch.ended():
        return f"{done}: {why}; another --stop-at, --patience or --on-collapse lets it go on"
    longer = replace(config, optim=replace(config.optim, epochs=epochs + 1))
    try:
        _check_epochs(config, longer, steps_per_epoch)
    except UserError:
        return f"{done}, where its schedule ends: to train longer, start a new run with more --epochs"
    return f"{done}: to train longer, resume it with --epochs {epochs + 1} or more"


def open_split(config: TrainConfig[Any], say: Say = lambda text: None) -> TrainSplit:
    """The training split that `config` names, cut but not read; `say` is told what is unusual about it."""
    data = config.data
    return open_train(
        data.data,
        data.data_dir,
        val_size=None if data.val_size is None else int(data.val_size) if data.val_size >= 1 else data.val_size,
        seed=config.engine.seed,
        image_size=data.image_size,
        download=data.download,
        limit=data.train_size,
        labelled=data.labelled,
        say=say,
    )


def build_parts(
    config: TrainConfig[Any], split: TrainSplit, say: Say, *, guide_comes: bool = False
) -> tuple[NetworkSet, TrainStep, TrainLoader]:
    """Networks, step and loader of a resolved configuration, from the run's seed.

    guide_comes: the guide's weights will be put in from a checkpoint of the run; --guide-from need not be there any more.
    """
    info, engine, attack = split.info, config.engine, config.attack
    for name in ("check_fidelity", "boundary_speed"):
        if getattr(engine, name) > len(split.val):
            raise UserError(
                f"{name} {getattr(engine, name)}: there are {len(split.val)} validation images; "
                "ask for fewer, or hold more out with --val-size"
            )
    device = torch.device(engine.device)
    seed_everything(engine.seed, deterministic=engine.deterministic)
    method = method_class(config.method)(config.options)
    networks = _networks(config, method, info, say, guide_comes=guide_comes)
    assert config.data.batch_size is not None
    for name in method.trains:
        check_single_values(networks.raw[name], info.image_shape, device, config.data.batch_size)
    streamed = split.in_files and config.data.loader != "resident"
    loader = make_loader(
        config.data.loader,
        split.train_files() if streamed else split.train_images(),
        workers=config.data.workers or 0,
        batch_size=config.data.batch_size,
        augment=config.data.augment,
        pad_mode=config.data.pad_mode,
        epoch_steps=config.data.epoch_steps,
        seed=engine.seed,
        device=device,
        channels_last=engine.channels_last == "on",
    )
    assert attack.steps is not None
    spec = PGDSpec(float(attack.eps), float(attack.step_size), attack.steps, norm=attack.norm, start=attack.start)
    assert config.optim.epochs is not None
    method.epochs = epochs_of_method(config.optim)
    method.buffers = method.make_buffers(torch.zeros(config.data.batch_size, *info.image_shape, device=device))
    factor = schedule_factor(config.optim, loader.steps_per_epoch)
    step = TrainStep(
        method,
        networks,
        spec,
        config.optim,
        Precision(engine.amp, device),
        factor,
        recorder=_recorder(engine),
        steps_of=attack_steps(config),
        awp=WeightPerturbation(networks.raw["model"], attack.awp, attack.awp_warmup) if attack.awp > 0 else None,
        momentum=momentum_at(config.optim, loader.steps_per_epoch) if config.optim.cycle_momentum else None,
        statistics_resets=_statistics_resets(config, networks, loader.steps_per_epoch),
        guide_stream=torch.cuda.Stream(device) if use_guide_stream(engine, method) else None,
        say=say,
    )
    # Building a guide drew random numbers; the attacks of two methods under one seed should still start alike.
    torch.manual_seed(engine.seed)
    return networks, step, loader


def _networks(config: TrainConfig[Any], method: Method[Any], info: DatasetInfo, say: Say, *, guide_comes: bool) -> NetworkSet:
    """The networks of a resolved configuration, from the present random state."""
    engine = config.engine
    mean, std = pixel_statistics(config.model, info)

    def build(name: str) -> torch.nn.Module:
        network = build_model(name, num_classes=info.num_classes, image_shape=info.image_shape, mean=mean, std=std)
        if config.model.bn_momentum is not None:
            for layer in (m for m in network.modules() if isinstance(m, _BatchNorm)):
                layer.momentum = config.model.bn_momentum
        return network

    # The model comes first, so that methods with and without a guide start from the same weights.
    model = build(config.model.model)
    guide = None
    if method.uses_guide:
        trained = config.model.guide_from is not None and not guide_comes
        guide = _trained_guide(config.model, info) if trained else build(config.model.guide)
    return NetworkSet(
        model,
        guide,
        frozen_guide="guide" not in method.trains,
        image_shape=info.image_shape,
        device=torch.device(engine.device),
        channels_last=engine.channels_last == "on",
        attack_bn=config.attack.attack_bn,
        attack=attack_switches(engine),
        compile_mode=engine.compile,
        ema=config.optim.ema,
        ema_buffers=config.optim.ema_buffers,
        say=say,
    )


def burn_in_step(config: TrainConfig[Any], step: TrainStep, say: Say) -> TrainStep | None:
    """The step of the burn-in before `step`, on its networks; None where there is no burn-in."""
    if config.optim.burn_in == 0:
        return None
    method, recorder = BurnIn(step.method), _recorder(config.engine)
    # The clipping that a method needs would only slow this down.
    optim = replace(step.optim, clip_grad=0.0)
    return TrainStep(
        method,
        step.networks,
        step.spec,
        optim,
        step.precision,
        step.lr_factor,
        recorder=recorder,
        statistics_resets=step.statistics_resets,
        say=say,
    )


def _statistics_resets(config: TrainConfig[Any], networks: NetworkSet, steps_per_epoch: int) -> set[int]:
    """The updates at which --bn-reset-epoch replaces running statistics: one in the burn-in, one after it."""
    epoch, burn_in = config.model.bn_reset_epoch, config.optim.burn_in
    if epoch is None:
        return set()
    if not any(isinstance(layer, _BatchNorm) for layer in networks.raw["model"].modules()):
        raise UserError(f"bn_reset_epoch {epoch}: {config.model.model} has no batch norm; leave it out")
    return {steps_per_epoch * e for e in (burn_in + epoch, *([epoch] if epoch < burn_in else []))}


def _recorder(engine: EngineConfig) -> CudaRecorder | None:
    return CudaRecorder(torch.device(engine.device)) if use_graphs(engine) and not _scaled(engine) else None


def _trained_guide(model: ModelConfig, info: DatasetInfo) -> torch.nn.Module:
    """The guide at --guide-from, which must fit the data and what --guide says."""
    assert model.guide_from is not None
    network, sidecar = load_network(guide_weights(Path(model.guide_from)))
    if sidecar.architecture != model.guide:
        raise UserError(
            f"--guide {model.guide}: the network in {model.guide_from} is a {sidecar.architecture}; leave --guide out"
        )
    difference = foreign(sidecar, info)
    if difference:
        raise UserError(f"--guide-from {model.guide_from} was trained on {difference}; train a guide on {info.name} first")
    return network


def attack_steps(config: TrainConfig[Any]) -> Callable[[int], int]:
    """The attack's number of steps by epoch of the method, of a resolved configuration."""
    attack, epochs = config.attack, epochs_of_method(config.optim)
    assert attack.steps is not None
    early = attack.steps if attack.early_steps is None else attack.early_steps
    late = attack.steps
    return lambda epoch: early if epoch < attack.early_share * epochs else late


def attack_switches(engine: EngineConfig) -> AttackSwitches:
    """How a run's attack is computed, of its resolved configuration."""
    return AttackSwitches(
        dtype=AMP_DTYPES[engine.amp],
        channels_last=engine.channels_last == "on",
        fold=engine.fold == "on",
        winograd=engine.winograd != "off",
        closed_form=engine.closed_form,
        compile=engine.compile,
        # A gradient scaler decides in Python, so only the attack of such a run can be captured.
        graphs=use_graphs(engine) and _scaled(engine),
    )


def _scaled(engine: EngineConfig) -> bool:
    return AMP_DTYPES[engine.amp] is torch.float16


def _load_weights(last: Path, networks: NetworkSet, config: TrainConfig[Any]) -> None:
    averaged = networks.ema is not None
    targets = [("model_raw" if averaged else "model", networks.raw["model"], config.model.model)]
    if networks.ema is not None:
        targets.append(("model", networks.ema.module, config.model.model))
    if "guide" in networks.raw:
        targets.append(("guide", networks.raw["guide"], config.model.guide))
    for name, module, architecture in targets:
        file = last / f"{name}.safetensors"
        state, sidecar = load_state(file)
        if (sidecar.architecture, sidecar.method) != (architecture, config.method):
            found, wanted = f"{sidecar.architecture} of {sidecar.method}", f"{architecture} of {config.method}"
            raise UserError(f"{file} is a {found}, this run's is a {wanted}")
        put_state(module, state, file, architecture)
        check_numbers(module, file)


def _check_changes(stored: TrainConfig[Any], asked: TrainConfig[Any]) -> None:
    before, after = identity(stored), identity(asked)
    changed = [key for key in before if before[key] != after.get(key)]
    if changed:
        key = changed[0]
        raise UserError(_changed(key, before[key], after.get(key)))


def _changed(key: str, before: object, after: object) -> str:
    return f"--resume goes on exactly as begun: {key} is {before} in this run, not {after}; start a new run to change it"


def _constants(config: TrainConfig[Any], epoch: int) -> tuple[float, ...]:
    """What the method of a resolved configuration computes from the epoch."""
    method = method_class(config.method)(config.options)
    method.epoch, method.epochs = max(0, epoch - config.optim.burn_in), epochs_of_method(config.optim)
    return method.constants()


def _check_epochs(stored: TrainConfig[Any], asked: TrainConfig[Any], steps_per_epoch: int) -> None:
    """Allow another number of epochs where the schedule so far is the same under both."""
    if stored.optim.epochs == asked.optim.epochs:
        return
    assert stored.optim.epochs is not None
    assert asked.optim.epochs is not None
    epochs = range(min(stored.optim.epochs, asked.optim.epochs))
    steps = range(len(epochs) * steps_per_epoch)
    before, after = (schedule_factor(c.optim, steps_per_epoch) for c in (stored, asked))
    early = attack_steps(stored), attack_steps(asked)
    if any(early[0](epoch) != early[1](epoch) for epoch in epochs):
        raise UserError(
            f"--early-share is of the number of epochs ({stored.optim.epochs} in this run, {asked.optim.epochs} asked), and "
            "other epochs would have had fewer attack steps; keep --epochs"
        )
    if stored.optim.ema_warmup > 0:
        raise UserError(
            f"--ema-warmup is of the number of epochs ({stored.optim.epochs} in this run, {asked.optim.epochs} asked); "
            "keep --epochs"
        )
    if any(_constants(stored, epoch) != _constants(asked, epoch) for epoch in epochs):
        raise UserError(
            f"method {stored.method} changes its loss at shares of the epochs ({stored.optim.epochs} in this run, "
            f"{asked.optim.epochs} asked); keep --epochs"
        )
    if any(before(s) != after(s) for s in steps):
        raise UserError(
            f"the {asked.optim.schedule} schedule depends on the number of epochs ({stored.optim.epochs} in this run, "
            f"{asked.optim.epochs} asked); start with --epochs {asked.optim.epochs} --stop-after {stored.optim.epochs} to pause"
        )
