"""The user's configuration -> `ResolvedConfig`: automatic values filled in, what cannot work refused."""

import functools
import importlib.util
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastdynat.config import AugmentationConfig, DataConfig, ExtraConfig, ModelConfig, TrainConfig
from fastdynat.config.augmentation_policy import parse_policy
from fastdynat.config.train_checks import check_train_config
from fastdynat.data import DatasetInfo, TrainSplit, check_dali, choose_loader, default_workers
from fastdynat.distributed import world
from fastdynat.errors import UserError
from fastdynat.methods import Method, method_class, method_name
from fastdynat.models import convolutions, split_style
from fastdynat.runs import guide_weights, read_sidecar
from fastdynat.training.extra_data import recorded_extra
from fastdynat.training.initial_weights import resolved_init
from fastdynat.training.method_buffers import without_image_state
from fastdynat.training.resolve_attack import check_ramps_end, resolved_attack
from fastdynat.training.resolve_engine import resolved_engine
from fastdynat.training.resolve_labels import check_label_use
from fastdynat.training.resolve_optim import resolved_optim
from fastdynat.training.resolved_config import ResolvedAttack, ResolvedConfig, ResolvedData, filled_in
from fastdynat.training.schedules import RELEASE_WARMUP, epochs_of_method
from fastdynat.tuning import Workload
from fastdynat.user_code import is_object, is_user_supplied

logger = logging.getLogger(__name__)

# The embedded digits are a thirtieth of the usual data. Measured for DYNAT (one seed, validation PGD-10):
# 85.4 % with 64, 77.1 % with a batch of 128.
BATCH_SIZE = {"digits": 64}
USUAL_BATCH_SIZE = 128
LARGEST_SMALL = 64  # pixels a side of the images that networks without a stem are made for
# Fewer images make the statistics of batch norm too noisy: the ImageNet error of ResNet-50 is 23.6 % with 32
# images per batch norm, 24.8 % with 8 and 34.7 % with 2 (Wu and He 2018, arXiv 1803.08494, figure 1).
ENOUGH_FOR_STATISTICS = 32


def resolve(
    config: TrainConfig[Any], info: DatasetInfo, *, announce: bool = True, carried_on: bool = False
) -> ResolvedConfig[Any]:
    """`config` with every automatic value filled in for the dataset `info`, the method and this machine.

    Args:
        announce: log what the unit rule read, the radii in use, and which precision is fast here.
        carried_on: the run may have begun on another machine, so nothing is timed anew.

    Raises:
        UserError: a value that cannot work, by name and remedy.
    """
    check_train_config(config)
    method = method_class(config.method)(config.options)
    notes: list[str] = []
    data = _data(config.data, config.augmentation, info, method, notes)
    _check_groups(config.augmentation, data)
    _check_cutout(config.augmentation, info)
    _check_colours(config.augmentation, info)
    model = _model(config.model, info, method)
    model = _with_sync_bn(model, data, config.optim.grad_accum_steps, notes)
    attack = resolved_attack(config.attack, info, method, notes)
    check_processes(config, data, attack, method, world().size)
    optim = resolved_optim(config, info)
    check_ramps_end(attack, epochs_of_method(optim))
    _check_accumulation(config.optim.grad_accum_steps, method)
    check_label_use(
        method,
        smoothing=config.optim.label_smoothing,
        mixing=config.augmentation.mixing,
        labelled=data.labelled,
    )
    _check_extra(config.extra, method)
    _check_run(config, method)  # before anything is timed
    workload = functools.partial(_workload, model, data, attack, info)
    engine = resolved_engine(config.engine, attack, optim, method, notes, None if carried_on else workload)
    for note in notes if announce else ():
        logger.info(note)
    return ResolvedConfig(
        method=method_name(config.method),
        options=config.options,
        data=data,
        extra=config.extra,
        augmentation=config.augmentation,
        model=model,
        attack=attack,
        optim=optim,
        engine=engine,
        run=config.run,
    )


def resolve_loader(
    config: ResolvedConfig[Any], split: TrainSplit, *, announce: bool = True
) -> ResolvedConfig[Any]:
    """`config` with the loader for the images of `split`, and the store and checksum of its extra images.

    announce: log the choice and its reason.
    """
    config = replace(config, extra=recorded_extra(config.extra, split.extra))
    data = config.data
    name, why = data.loader, "as asked"
    cuts_files = split.in_files and split.extra is None and bool(config.augmentation.scale)
    if name == "auto":
        device = torch.device(config.engine.device)
        name, why = choose_loader(split, device, cuts_files=cuts_files)  # type: ignore[assignment]
    if name == "resident" and cuts_files:
        raise UserError(
            f"{config.augmentation.crops} crops the original images in their files, but --loader resident "
            "keeps resized images; use --loader torch"
        )
    workers = default_workers() if data.workers is None and name != "resident" else data.workers
    what = {"dali": f", {workers} thread(s)", "torch": f", {workers} worker process(es)"}.get(name, "")
    if announce:
        logger.info("loader %s%s: %s", name, what, why)
    return replace(config, data=replace(data, loader=name, workers=workers))


def check_sizes(config: TrainConfig[Any], split: TrainSplit) -> None:
    """Refuse a new run that asks for more images than the training data has; a resumed run keeps its own."""
    data = config.data
    held_out = len(split.val)
    for name in ("train_size", "labelled"):
        asked = getattr(data, name)
        if asked is not None and asked > len(split.train):
            raise UserError(
                f"{name} {asked}: {data.data} has {len(split.train)} training images beside the {held_out} "
                "held out for validation; ask for fewer, or leave it out for all"
            )


def warn_of_first_epoch(config: ResolvedConfig[Any]) -> None:
    """Warn of a run of one epoch under --schedule release, whose first epoch has a fifth of the rate."""
    lr = config.optim.lr
    if config.optim.schedule == "release" and epochs_of_method(config.optim) == 1:
        logger.info(
            "the only epoch trains at lr/5 = %g, like the first epoch of every --schedule release "
            "(the DYNAT code's); --schedule constant trains at %g",
            lr * RELEASE_WARMUP,
            lr,
        )


def _data(
    data: DataConfig,
    augmentation: AugmentationConfig,
    info: DatasetInfo,
    method: Method[Any],
    notes: list[str],
) -> ResolvedData:
    if data.labelled is not None and not method.semi_supervised:
        raise UserError(
            f"labelled {data.labelled}: method {method.name} needs every label; "
            "leave it out, or use --method vat"
        )
    if data.loader == "dali":
        check_dali()
    batch_size = BATCH_SIZE.get(info.name, USUAL_BATCH_SIZE) if data.batch_size is None else data.batch_size
    augment = info.augment if data.augment == "auto" else data.augment
    if augmentation.crops:  # in place of those of --augment, which is none of its own then
        augment = "flip" if "flip" in augment else "none"
    if data.augment == "auto" and is_user_supplied(data.data):
        logger.info("your own data is not augmented by default; --augment crop-flip turns that on")
    if data.pad_mode != "zeros" and "crop" not in augment:
        notes.append(f"pad_mode {data.pad_mode} has no effect: augmentation {augment} takes no crops")
    return filled_in(ResolvedData, data, batch_size=batch_size, augment=augment)


def _check_groups(augmentation: AugmentationConfig, data: ResolvedData) -> None:
    groups = augmentation.mixup_groups
    if augmentation.mixing and 2 * groups > data.batch_size:
        raise UserError(
            f"mixup_groups {groups}: a batch of {data.batch_size} images has at most {data.batch_size // 2} "
            "groups of two; use fewer, or a larger --batch-size"
        )


def _check_cutout(augmentation: AugmentationConfig, info: DatasetInfo) -> None:
    height, width = info.image_shape[1:]
    if augmentation.cutout > min(height, width):
        raise UserError(
            f"cutout {augmentation.cutout}: the images are {height}x{width} pixels, and would be mostly "
            "black; use fewer pixels (16 for 32x32)"
        )


def _check_colours(augmentation: AugmentationConfig, info: DatasetInfo) -> None:
    """Raise UserError for changes of colour where images have channels that are no colours."""
    channels = info.image_shape[0]
    used = f"color_jitter {augmentation.color_jitter:g}" if augmentation.color_jitter else ""
    if parse_policy(augmentation.aa).name != "none":
        used = f"aa {augmentation.aa}"
    if used and channels not in (1, 3):
        raise UserError(
            f"{used}: it changes the colours of grey or RGB images, but those of {info.name} have {channels} "
            "channels; leave it out (--scale, --cutout, --reprob, --mixup and --cutmix take any number)"
        )


def _model(model: ModelConfig, info: DatasetInfo, method: Method[Any]) -> ModelConfig:
    name = ("small" if info.name == "digits" else "resnet18") if model.model == "auto" else model.model
    init_from, name = resolved_init(model, name)
    model = replace(model, init_from=init_from)
    if not method.uses_guide:
        if model.guide_from is not None:
            raise UserError(
                f"--guide-from {model.guide_from}: method {method.name} has no guide; leave it out"
            )
        if model.guide not in ("auto", "none"):
            raise UserError(f"--guide {model.guide}: method {method.name} has no guide; leave it out")
        return replace(model, model=name, guide="none")
    if model.guide_from is not None:
        path = Path(model.guide_from).absolute()
        guide = read_sidecar(guide_weights(path))[0].architecture if model.guide == "auto" else model.guide
        return replace(model, model=name, guide=guide, guide_from=str(path))
    if "guide" not in method.trains:
        raise UserError(
            f"method {method.name} needs a trained guide: name its run with --guide-from RUN "
            f"(one is made by: fastdynat train --method {method.guide_made_by} --run-dir RUN)"
        )
    return replace(
        model, model=name, guide=_usual_guide(name, info) if model.guide == "auto" else model.guide
    )


def _usual_guide(name: str, info: DatasetInfo) -> str:
    """The guide that learns beside the model `name`, where none is named."""
    if split_style(name)[0] in ("small", "small-wide"):
        return "small"
    # The releases' guide has no stem: on larger images it would cost many times what the model does. A
    # network object is no architecture: a copy would start from its weights.
    if max(info.image_shape[1:]) > LARGEST_SMALL and not is_object(name):
        return name
    return "resnet18_s1122"


def _check_accumulation(parts: int, method: Method[Any]) -> None:
    if parts > 1 and method.couples_images:
        raise UserError(
            f"grad_accum_steps {parts}: method {method.name} couples the images of a batch and needs them at "
            "once; leave it out, and use more processes, a smaller --batch-size or --amp"
        )


def _check_extra(extra: ExtraConfig, method: Method[Any]) -> None:
    if method.follows_images and extra.extra_data is not None and extra.extra_share > 0:
        raise UserError(
            f"extra_data {extra.extra_data}: method {method.name} keeps a perturbation of each image from "
            "one epoch to the next, and extra images come back too rarely; leave it out, or "
            f"{without_image_state(method)}"
        )


def _with_sync_bn(
    model: ModelConfig, data: ResolvedData, micro_batches: int, notes: list[str]
) -> ModelConfig:
    """`model` with on or off for ``sync_bn: auto``; `notes` gets the choice and its reason."""
    if model.sync_bn != "auto":
        return model
    processes = world().size
    if processes == 1:
        return replace(model, sync_bn="on")
    images = data.batch_size // (processes * micro_batches)
    few = _synchronises(model, images)
    if few:
        notes.append(
            f"--sync-bn on: batch norm, if any, computes its statistics over all {processes} processes: each "
            f"has only {images} images of a batch (fewer than {ENOUGH_FOR_STATISTICS})"
        )
    else:
        notes.append(
            f"--sync-bn off: batch norm, if any, computes its statistics over the {images} images of each "
            "process; with on, they would not depend on the number of processes"
        )
    return replace(model, sync_bn="on" if few else "off")


def _synchronises(model: ModelConfig, images: int) -> bool:
    """True if several processes, with `images` of a batch each, share the statistics of batch norm."""
    return model.sync_bn == "on" or (model.sync_bn == "auto" and images < ENOUGH_FOR_STATISTICS)


def check_processes(
    config: TrainConfig[Any],
    data: ResolvedData,
    attack: ResolvedAttack,
    method: Method[Any],
    processes: int,
) -> None:
    """Raise UserError for a method that cannot train like this in so many processes."""
    images = data.batch_size // (processes * config.optim.grad_accum_steps)
    if processes > 1 and _synchronises(config.model, images):
        method.check_sync_bn(attack.attack_bn)


def _check_run(config: TrainConfig[Any], method: Method[Any]) -> None:
    if config.run.on_collapse == "stop" and not method.logs_adv_acc:
        raise UserError(
            f"on_collapse stop: method {method.name} logs no accuracy on attacked training images; "
            "leave it out"
        )
    if config.run.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs the extra: pip install 'fastdynat[tensorboard]'")


def _workload(model: ModelConfig, data: ResolvedData, attack: ResolvedAttack, info: DatasetInfo) -> Workload:
    """The convolutions of one training step."""
    layers = convolutions(model.model, num_classes=info.num_classes, image_shape=info.image_shape)
    return Workload.of(layers, data.batch_size, attack.steps)
