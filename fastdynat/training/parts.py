"""The parts of a run, built from its resolved configuration: data split, networks, step and loader."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from fastdynat.attack_engine.engine import AttackSwitches
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.config import EngineConfig, ModelConfig, TrainConfig
from fastdynat.data import DatasetInfo, TrainLoader, TrainSplit, make_loader, open_train
from fastdynat.errors import UserError
from fastdynat.execution.graph_capture import CudaRecorder
from fastdynat.methods import BurnIn, Method, method_class
from fastdynat.models import build_model
from fastdynat.runs import foreign, guide_weights, load_network
from fastdynat.training.awp import WeightPerturbation
from fastdynat.training.networks import NetworkSet, pixel_statistics
from fastdynat.training.precision import Precision
from fastdynat.training.resolve import Say, use_fused_conv, use_graphs, use_guide_stream
from fastdynat.training.rng import seed_everything
from fastdynat.training.schedules import epochs_of_method, momentum_at, schedule_factor
from fastdynat.training.single_values import check_single_values
from fastdynat.training.step import TrainStep
from fastdynat.tuning.devices import AMP_DTYPES


def open_split(config: TrainConfig[Any], say: Say = lambda text: None) -> TrainSplit:
    """The training split that `config` names, cut but not read; `say` is told what is unusual about it."""
    data = config.data
    return open_train(
        data.data,
        data.data_dir,
        val_size=None
        if data.val_size is None
        else int(data.val_size)
        if data.val_size >= 1
        else data.val_size,
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

    guide_comes: the guide's weights will be put in from a checkpoint of the run; --guide-from need not be
    there any more.
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
    loader = _loader(config, split, device)
    assert attack.steps is not None
    spec = PGDSpec(
        float(attack.eps), float(attack.step_size), attack.steps, norm=attack.norm, start=attack.start
    )
    assert config.optim.epochs is not None
    method.epochs = epochs_of_method(config.optim)
    method.buffers = method.make_buffers(
        torch.zeros(config.data.batch_size, *info.image_shape, device=device)
    )
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
        awp=WeightPerturbation(networks.raw["model"], attack.awp, attack.awp_warmup)
        if attack.awp > 0
        else None,
        momentum=momentum_at(config.optim, loader.steps_per_epoch) if config.optim.cycle_momentum else None,
        statistics_resets=_statistics_resets(config, networks, loader.steps_per_epoch),
        guide_stream=torch.cuda.Stream(device) if use_guide_stream(engine, method) else None,
        whole=config.data.batch_size,
        say=say,
    )
    # Building a guide drew random numbers; the attacks of two methods under one seed should still start
    # alike.
    torch.manual_seed(engine.seed)
    return networks, step, loader


def _loader(config: TrainConfig[Any], split: TrainSplit, device: torch.device) -> TrainLoader:
    data, engine = config.data, config.engine
    streamed = split.in_files and data.loader != "resident"
    assert data.batch_size is not None
    return make_loader(
        data.loader,
        split.train_files() if streamed else split.train_images(),
        workers=data.workers or 0,
        batch_size=data.batch_size,
        augment=data.augment,
        pad_mode=data.pad_mode,
        epoch_steps=data.epoch_steps,
        drop_last=data.drop_last,
        seed=engine.seed,
        device=device,
        channels_last=engine.channels_last == "on",
    )


def _networks(
    config: TrainConfig[Any], method: Method[Any], info: DatasetInfo, say: Say, *, guide_comes: bool
) -> NetworkSet:
    """The networks of a resolved configuration, from the present random state."""
    engine = config.engine
    mean, std = pixel_statistics(config.model, info)

    def build(name: str) -> torch.nn.Module:
        network = build_model(
            name, num_classes=info.num_classes, image_shape=info.image_shape, mean=mean, std=std
        )
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
        raise UserError(
            f"--guide-from {model.guide_from} was trained on {difference}; train a guide on {info.name} first"
        )
    return network


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
        whole=config.data.batch_size,
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
        fused_conv=use_fused_conv(engine),
        winograd=engine.winograd != "off",
        closed_form=engine.closed_form,
        compile=engine.compile,
        # A gradient scaler decides in Python, so only the attack of such a run can be captured.
        graphs=use_graphs(engine) and _scaled(engine),
    )


def _recorder(engine: EngineConfig) -> CudaRecorder | None:
    return CudaRecorder(torch.device(engine.device)) if use_graphs(engine) and not _scaled(engine) else None


def _scaled(engine: EngineConfig) -> bool:
    return AMP_DTYPES[engine.amp] is torch.float16
