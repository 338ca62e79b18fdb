"""Parameter groups of a network: weight decay and share of the learning rate of each of its parameters."""

from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any

from torch import nn

from fastdynat.training.layer_depths import backbone_of, head_parameters, layer_depths
from fastdynat.training.norm_layers import is_norm
from fastdynat.training.resolved_config import ResolvedOptim


def parameter_groups(module: nn.Module, config: ResolvedOptim) -> list[dict[str, Any]]:
    """The parameter groups of one network, by scale of the rate (`lr_scale`, as timm calls it) and decay.

    Frozen parameters are in none.
    """
    scales, exempt = learning_rate_scales(module, config), set(_exempt(module, config))
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for scale in dict.fromkeys(scales.values()):  # first those with decay, as states on disk have them
        groups |= {(scale, False): [], (scale, True): []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups[scales[name], name in exempt].append(parameter)
    return [_group(members, *key) for key, members in groups.items() if members]


def _group(members: list[nn.Parameter], scale: float, free: bool) -> dict[str, Any]:
    decay = {"weight_decay": 0.0} if free else {}
    return {"params": members, **decay, **({} if scale == 1 else {"lr_scale": scale})}


def learning_rate_scales(module: nn.Module, config: ResolvedOptim) -> dict[str, float]:
    """The factor on the learning rate of each parameter of `module`, by name.

    Raises:
        UserError: --layer-decay and a network whose depths are not known, or --head-lr-scale and one that
            does not end in a linear layer.
    """
    scales = dict.fromkeys((name for name, _ in module.named_parameters()), 1.0)
    if config.layer_decay is not None:
        depths = layer_depths(module)
        top = max(depths.values())
        scales = {name: config.layer_decay ** (top - depths.get(name, top)) for name in scales}
    if config.head_lr_scale != 1:
        for name in head_parameters(module):
            scales[name] *= config.head_lr_scale
    return scales


def _exempt(module: nn.Module, config: ResolvedOptim) -> Iterator[str]:
    """The names of the parameters without weight decay."""
    if not config.decay_norms:
        for name, layer in module.named_modules():
            if is_norm(layer):
                yield from (f"{name}.{key}".lstrip(".") for key, _ in layer.named_parameters(recurse=False))
    listed = set(_listed(module))
    for name, parameter in module.named_parameters():
        bias = name.rpartition(".")[2] == "bias"
        kinds = {"biases": bias, "1d": bias or parameter.ndim <= 1, "listed": name in listed}
        if any(kinds[kind] for kind in config.decay_exempt):
            yield name


def lists_exempt(module: nn.Module) -> bool:
    """True if `module` lists parameters of its own for ``--decay-exempt listed``."""
    return any(True for _ in _listed(module))


def _listed(module: nn.Module) -> Iterator[str]:
    """The names of the parameters that timm's ``no_weight_decay`` of `module` lists, as glob patterns."""
    prefix, network = backbone_of(module)
    patterns = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()  # type: ignore[operator]
    for name, _ in module.named_parameters():
        if any(fnmatch(name.removeprefix(prefix), pattern) for pattern in patterns):
            yield name
