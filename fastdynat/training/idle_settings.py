"""Settings without effect on the networks, the method or the length of a run, in words."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastdynat.methods import Method
from fastdynat.methods.base import first_epoch
from fastdynat.training.networks import NetworkSet
from fastdynat.training.parameter_groups import lists_exempt
from fastdynat.training.resolved_config import ResolvedConfig, ResolvedOptim
from fastdynat.training.schedules import epochs_of_method, schedule_epochs, schedule_factor


def idle_settings(config: ResolvedConfig[Any], method: Method[Any], networks: NetworkSet) -> list[str]:
    """A line for each setting that changes nothing in this run, although it would in others.

    What excludes itself by the flags alone is refused by `check_effects` of the command.
    """
    idle, extra = [*_after_the_end(config, method), *_of_networks(config, networks)], config.extra
    if extra.extra_data is not None and extra.extra_share == 0:
        idle.append(f"extra_data {extra.extra_data} has no effect: --extra-share 0 takes no extra images")
    return idle


def _after_the_end(config: ResolvedConfig[Any], method: Method[Any]) -> Iterator[str]:
    """Settings for epochs that the run does not have, and epochs without a learning rate."""
    optim, attack, reset = config.optim, config.attack, config.model.bn_reset_epoch
    epochs = epochs_of_method(optim)
    if attack.awp > 0 and attack.awp_warmup >= epochs:
        yield (
            f"awp {attack.awp:g} has no effect: --awp-warmup {attack.awp_warmup} leaves out all {epochs} "
            "epochs of the method"
        )
    if reset is not None and reset >= max(epochs, optim.burn_in):
        yield f"bn_reset_epoch {reset} has no effect: the method has {epochs} epochs, counted from 0"
    for key, share in method.begins().items():
        if first_epoch(share, epochs) >= epochs:
            yield (
                f"{key} {share:g}: the method has {epochs} epochs, and what begins after this share of them "
                f"never does; use more epochs or a smaller --{key.replace('_', '-')}"
            )
    begins, ends = _epochs_with_a_rate(optim)
    if begins > optim.burn_in:
        one = begins - optim.burn_in == 1
        which = f"epoch {begins}" if one else f"epochs {optim.burn_in + 1} to {begins}"
        yield (
            f"in {which} of {optim.epochs} the learning rate is 0: it begins at 0, and changes only between "
            "epochs with --schedule-by epoch; use --schedule-by step, or --schedule-ahead 1"
        )
    if ends < optim.epochs:
        yield (
            f"from epoch {ends + 1} of {optim.epochs} on the learning rate is 0: --schedule "
            f"{optim.schedule} over {schedule_epochs(optim)} epochs has ended there; use --min-lr, or "
            "another --schedule-epochs"
        )


def _epochs_with_a_rate(optim: ResolvedOptim) -> tuple[int, int]:
    """The first epoch of the method that has a learning rate, and the one after the last that has."""
    factor = schedule_factor(optim, 2)  # two updates in each epoch: one at its start, one inside of it
    moving = [
        epoch
        for epoch in range(optim.burn_in, optim.epochs)
        if factor(2 * epoch) > 0 or factor(2 * epoch + 1) > 0
    ]
    return (moving[0], moving[-1] + 1) if moving else (optim.epochs, optim.epochs)


def _of_networks(config: ResolvedConfig[Any], networks: NetworkSet) -> Iterator[str]:
    """Settings for layers, parameters or networks that the run does not have."""
    optim, model, name = config.optim, networks.raw["model"], config.model.model
    trained = [networks.raw[key] for key in networks.passes]
    if not _has_batch_norm(model):
        for key, value, usual in (
            ("attack_bn", config.attack.attack_bn, "eval"),
            ("ema_buffers", optim.ema_buffers, "average"),
        ):
            if value != usual:
                yield f"{key} {value} has no effect: {name} has no batch norm"
    if config.model.bn_momentum is not None and not any(map(_has_batch_norm, networks.raw.values())):
        yield f"bn_momentum {config.model.bn_momentum:g} has no effect: {name} has no batch norm"
    if optim.optimizers == "joint" and len(trained) < 2:
        yield f"optimizers joint has no effect: method {config.method} trains one network"
    if "listed" in optim.decay_exempt and not any(map(lists_exempt, trained)):
        yield f"decay_exempt listed has no effect: {name} lists no parameters (no_weight_decay)"


def _has_batch_norm(network: nn.Module) -> bool:
    return any(isinstance(layer, _BatchNorm) for layer in network.modules())
