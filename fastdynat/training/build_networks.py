"""The model of a run, and the guide where its method has one, built from the resolved configuration."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastdynat.attack_engine.attack_switches import AttackSwitches
from fastdynat.config import ModelConfig
from fastdynat.data import DatasetInfo
from fastdynat.distributed import world
from fastdynat.errors import UserError
from fastdynat.execution.fallbacks import Fallbacks
from fastdynat.methods import Method
from fastdynat.models import build_model
from fastdynat.runs import data_difference, guide_weights, load_network
from fastdynat.training.frozen_parts import FrozenParts
from fastdynat.training.initial_weights import put_initial_weights
from fastdynat.training.networks import NetworkSet, pixel_statistics
from fastdynat.training.recomputed_statistics import statistics_layers
from fastdynat.training.resolved_config import ResolvedConfig, ResolvedEngine
from fastdynat.training.run_average import averages_every
from fastdynat.tuning.devices import AMP_DTYPES

logger = logging.getLogger(__name__)


def build_networks(
    config: ResolvedConfig[Any],
    method: Method[Any],
    info: DatasetInfo,
    fallbacks: Fallbacks,
    *,
    load_sources: bool,
) -> NetworkSet:
    """The networks of `config`, initialised from torch's present random state.

    load_sources: read the weights at --init-from and --guide-from, where they are given.

    Raises:
        UserError: the weights at --init-from do not fit the model; --freeze matches nothing or everything;
            the network at --guide-from does not fit the data or --guide; a network's layers
            synchronise although --sync-bn is off, or cannot although it is on.
    """
    engine, names = config.engine, config.model
    # The model comes first, so that methods with and without a guide start from the same weights.
    model = _untrained(names.model, names, info, divisor=names.logit_scale)
    frozen = FrozenParts(model, names.freeze)
    initial = names.init_sha256
    if names.init_from is not None and load_sources:
        initial = put_initial_weights(model, names, info, frozen)
    frozen.freeze()
    if names.freeze and load_sources:
        logger.info(frozen.described())
    if config.optim.ema_buffers == "recompute" and not statistics_layers(model):
        raise UserError(f"ema_buffers recompute: {names.model} has no batch norm; leave it out")
    guide = None
    if method.uses_guide:
        source = names.guide_from if load_sources else None
        guide = (
            _untrained(names.guide, names, info)
            if source is None
            else _trained_guide(source, names.guide, info)
        )
    if names.bn_momentum is not None:
        for network in (model, *([guide] if guide is not None else [])):
            _set_momentum(network, names.bn_momentum)
    synchronised = names.sync_bn == "on" and not world().alone
    trained = [model, *([guide] if guide is not None and "guide" in method.trains else [])]
    if names.sync_bn == "off" and not world().alone:
        _refuse_synchronising(trained)
    return NetworkSet(
        model,
        guide,
        frozen_guide="guide" not in method.trains,
        image_shape=info.image_shape,
        device=torch.device(engine.device),
        channels_last=engine.channels_last == "on",
        attack_bn=config.attack.attack_bn,
        sync_bn=synchronised,
        attack=attack_switches(engine, communicates=synchronised and config.attack.attack_bn != "eval"),
        compile_mode=engine.compile,
        checkpointing=engine.grad_checkpointing,
        ema=config.optim.ema,
        swa=config.optim.swa,
        ema_buffers=config.optim.ema_buffers,
        ema_every=averages_every(config.optim),
        fallbacks=fallbacks,
        initial=initial,
    )


def _untrained(
    name: str, settings: ModelConfig, info: DatasetInfo, *, divisor: float = 1.0
) -> torch.nn.Module:
    mean, std = pixel_statistics(settings, info)
    classes, shape = info.num_classes, info.image_shape
    return build_model(name, num_classes=classes, image_shape=shape, mean=mean, std=std, divisor=divisor)


def _set_momentum(network: nn.Module, momentum: float) -> None:
    """Give all batch norms of `network` the `momentum` of --bn-momentum."""
    for layer in (m for m in network.modules() if isinstance(m, _BatchNorm)):
        layer.momentum = momentum


def _refuse_synchronising(networks: list[nn.Module]) -> None:
    """Refuse torch.nn.SyncBatchNorm, which averages over all processes and waits where one has no batch."""
    for name, layer in (pair for network in networks for pair in network.named_modules()):
        if isinstance(layer, nn.SyncBatchNorm):
            raise UserError(
                f"--sync-bn off: the layer {name} is a torch.nn.SyncBatchNorm, which synchronises by itself; "
                "use --sync-bn on, or BatchNorm layers"
            )


def _trained_guide(source: str, architecture: str, info: DatasetInfo) -> torch.nn.Module:
    """The network at `source` (--guide-from), which must fit the data and what --guide says."""
    network, sidecar = load_network(guide_weights(Path(source)))
    if sidecar.architecture != architecture:
        raise UserError(
            f"--guide {architecture}: the network in {source} is a {sidecar.architecture}; leave --guide out"
        )
    if difference := data_difference(sidecar, info):
        raise UserError(
            f"--guide-from {source} was trained on {difference}; train a guide on {info.name} first"
        )
    return network


def attack_switches(engine: ResolvedEngine, *, communicates: bool = False) -> AttackSwitches:
    """The settings of a run's attack engine.

    communicates: the attacked network takes statistics over all processes; its attacks are not captured by
        themselves, because ranks would have to agree on every graph.
    """
    return AttackSwitches(
        dtype=AMP_DTYPES[engine.amp],
        channels_last=engine.channels_last == "on",
        fold=engine.fold == "on",
        fused_conv=engine.uses_fused_conv,
        fused_where_faster=engine.fused_conv == "auto",
        winograd=engine.winograd != "off",
        closed_form=engine.closed_form,
        compile=engine.compile,
        # A gradient scaler decides in Python, so only the attack of such a run can be captured.
        graphs=engine.uses_graphs and has_gradient_scaler(engine) and not communicates,
    )


def has_gradient_scaler(engine: ResolvedEngine) -> bool:
    """True if the update scales its loss, as float16 needs."""
    return AMP_DTYPES[engine.amp] is torch.float16
