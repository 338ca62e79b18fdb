"""Parts of a run, built from its resolved configuration: data split, networks, training step and loader."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from fastdynat.config import TrainConfig
from fastdynat.data import Images, TrainLoader, TrainSplit, make_loader, open_train
from fastdynat.data.augmentation import stages_of
from fastdynat.data.augmentation.resized_crop import ResizedCrop
from fastdynat.data.extra_sampler import ExtendedImages
from fastdynat.data.mixing import Mixing
from fastdynat.distributed import world
from fastdynat.distributed.shares import deal
from fastdynat.errors import UserError
from fastdynat.execution.fallbacks import Fallbacks
from fastdynat.execution.graph_capture import CudaRecorder
from fastdynat.methods import Method, method_class
from fastdynat.methods.burn_in import BurnIn
from fastdynat.ops import use_backend
from fastdynat.training.attack_ramps import attack_sizes
from fastdynat.training.awp import WeightPerturbation
from fastdynat.training.build_networks import attack_switches, build_networks, has_gradient_scaler
from fastdynat.training.extra_data import open_extra
from fastdynat.training.method_buffers import give_buffers
from fastdynat.training.networks import NetworkSet
from fastdynat.training.precision import Precision
from fastdynat.training.resolved_config import ResolvedConfig
from fastdynat.training.rng import seed_everything
from fastdynat.training.schedules import attack_steps, epochs_of_method, momentum_at, schedule_factor
from fastdynat.training.seen_validation import held_out
from fastdynat.training.single_values import check_single_values
from fastdynat.training.step import TrainStep

__all__ = ["RunParts", "attack_switches", "build_parts", "burn_in_step", "open_split"]


class RunParts(NamedTuple):
    """Networks, the step that updates them, and the loader of its batches."""

    networks: NetworkSet
    step: TrainStep
    loader: TrainLoader


def open_split(config: TrainConfig[Any]) -> TrainSplit:
    """The training split that `config` names, with extra images; no image is read yet, but packed."""
    data = config.data
    split = open_train(
        data.data,
        data.data_dir,
        val_size=held_out(data.val_size),
        seed=config.engine.seed,
        image_size=data.image_size,
        download=data.download,
        limit=data.train_size,
        labelled=data.labelled,
    )
    return replace(split, extra=open_extra(config, split.info))


def build_parts(
    config: ResolvedConfig[Any],
    split: TrainSplit,
    *,
    fallbacks: Fallbacks | None = None,
    load_sources: bool = True,
) -> RunParts:
    """Networks, step and loader of a run, initialised from its seed.

    Args:
        fallbacks: collects the speed-ups that cannot be used; None logs them.
        load_sources: read the weights at --init-from and --guide-from. False where a checkpoint of the run
            has them, and they may be gone.

    Raises:
        UserError: validation has fewer images than a measurement asks for, or the networks cannot train.
    """
    info, engine = split.info, config.engine
    fallbacks = fallbacks or Fallbacks()
    for name in ("check_fidelity", "boundary_speed"):
        if getattr(engine, name) > len(split.val):
            raise UserError(
                f"{name} {getattr(engine, name)}: there are {len(split.val)} validation images; "
                "ask for fewer, or hold more out with --val-size"
            )
    device = torch.device(engine.device)
    seed_everything(engine.seed, deterministic=engine.deterministic)
    method = method_class(config.method)(config.options)
    with use_backend(engine.kernels):  # the attack's replica takes the kernels that it may use
        networks = build_networks(config, method, info, fallbacks, load_sources=load_sources)
    for name in method.trains:
        check_single_values(networks.raw[name], info.image_shape, device, config.data.batch_size)
    loader = _loader(config, split, device)
    method.epochs = epochs_of_method(config.optim)
    method.label_smoothing = config.optim.label_smoothing
    method.num_classes, method.num_images = info.num_classes, loader.num_images
    images = deal(config.data.batch_size, world().rank, world().size).images
    give_buffers(method, torch.zeros(images, *info.image_shape, device=device))
    step = _step(config, method, networks, loader.steps_per_epoch, fallbacks)
    # Building a guide drew random numbers; two methods under one seed should still start their attacks alike.
    torch.manual_seed(engine.seed)
    return RunParts(networks, step, loader)


def _loader(config: ResolvedConfig[Any], split: TrainSplit, device: torch.device) -> TrainLoader:
    data, engine = config.data, config.engine
    streamed = split.in_files and data.loader != "resident"
    own: Images = split.train_files() if streamed else split.train_images()
    images: Images | ExtendedImages = own
    if split.extra is not None:
        images = ExtendedImages(own, split.extra, config.extra.extra_share, config.extra.extra_replacement)
    return make_loader(
        data.loader,
        images,
        workers=data.workers or 0,
        batch_size=data.batch_size,
        augment=data.augment,
        pad_mode=data.pad_mode,
        epoch_steps=data.epoch_steps,
        drop_last=data.drop_last,
        seed=engine.seed,
        ranks=world().size,
        rank=world().rank,
        parts=config.optim.grad_accum_steps,
        device=device,
        channels_last=engine.channels_last == "on",
        stages=stages_of(config.augmentation, split.info),
        mixing=Mixing.of(config.augmentation, split.info.num_classes),
        resized_crop=ResizedCrop.of(config.augmentation),
    )


def _step(
    config: ResolvedConfig[Any],
    method: Method[Any],
    networks: NetworkSet,
    steps_per_epoch: int,
    fallbacks: Fallbacks,
) -> TrainStep:
    attack, optim, engine = config.attack, config.optim, config.engine
    device, model = torch.device(engine.device), networks.raw["model"]
    return TrainStep(
        method,
        networks,
        attack.specs()[0],
        optim,
        Precision(engine.amp, device),
        schedule_factor(optim, steps_per_epoch),
        recorder=_recorder(config),
        steps_of=attack_steps(attack, epochs_of_method(optim)),
        awp=WeightPerturbation(model, attack.awp, attack.awp_warmup) if attack.awp > 0 else None,
        momentum=momentum_at(optim, steps_per_epoch) if optim.cycle_momentum else None,
        sizes=attack_sizes(attack, optim, steps_per_epoch),
        statistics_resets=_statistics_resets(config, networks, steps_per_epoch),
        guide_stream=torch.cuda.Stream(device) if engine.uses_guide_stream(method) else None,
        whole=config.data.batch_size,
        accumulate=optim.grad_accum_steps,
        others=attack.specs()[1:],
        norm_choice=attack.norm_choice,
        seed=engine.seed,
        fallbacks=fallbacks,
    )


def burn_in_step(config: ResolvedConfig[Any], step: TrainStep) -> TrainStep | None:
    """The natural training before `step`, on the same networks; None where there is no burn-in."""
    if config.optim.burn_in == 0:
        return None
    return TrainStep(
        BurnIn(step.method),
        step.networks,
        step.spec,
        replace(step.optim, clip_grad=0.0),  # the clipping that a method needs would only slow this down
        step.precision,
        step.lr_factor,
        recorder=_recorder(config),
        statistics_resets=step.statistics_resets,
        whole=config.data.batch_size,
        accumulate=config.optim.grad_accum_steps,
        seed=config.engine.seed,
        fallbacks=step.fallbacks,
    )


def _statistics_resets(config: ResolvedConfig[Any], networks: NetworkSet, steps_per_epoch: int) -> set[int]:
    """The updates at which --bn-reset-epoch replaces running statistics: one in the burn-in, one after it."""
    epoch, burn_in = config.model.bn_reset_epoch, config.optim.burn_in
    if epoch is None:
        return set()
    if not any(isinstance(layer, _BatchNorm) for layer in networks.raw["model"].modules()):
        raise UserError(f"bn_reset_epoch {epoch}: {config.model.model} has no batch norm; leave it out")
    return {steps_per_epoch * e for e in (burn_in + epoch, *([epoch] if epoch < burn_in else []))}


def _recorder(config: ResolvedConfig[Any]) -> CudaRecorder | None:
    engine = config.engine
    # An update of sharded momentum waits for broadcasts of PyTorch's own, which it starts one by one.
    if not engine.uses_graphs or has_gradient_scaler(engine) or config.optim.zero1:
        return None
    return CudaRecorder(torch.device(engine.device))
