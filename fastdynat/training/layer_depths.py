"""Depths of a network's parameters, for --layer-decay, and its last layer, for --head-lr-scale."""

import importlib

from torch import nn

from fastdynat.errors import UserError
from fastdynat.models.build import Normalize
from fastdynat.training.norm_layers import is_norm


def backbone_of(module: nn.Module) -> tuple[str, nn.Module]:
    """The network that `build_model` put its own layers around, and the prefix of its parameters' names."""
    parts = dict(module.named_children())
    ours = parts.keys() in ({"normalize", "net"}, {"normalize", "net", "divide"})
    if isinstance(module, nn.Sequential) and ours and isinstance(parts["normalize"], Normalize):
        return "net.", parts["net"]
    return "", module


def layer_depths(module: nn.Module) -> dict[str, int]:
    """The depth of each parameter of `module` by name, from 0 at the images.

    Of a network of timm, or any other with ``group_matcher``, it is timm's. Of ours, the layers before the
    first residual block have depth 0, each block (of `small`: each convolution) one more than the one before
    it, and what follows the last block one more again. `small` begins with its first convolution, at 0.

    Raises:
        UserError: torchvision's networks and those of users have no such order.
    """
    prefix, network = backbone_of(module)
    if hasattr(network, "group_matcher"):
        grouped = importlib.import_module("timm.models").group_parameters
        matcher = network.group_matcher(coarse=False)  # type: ignore[operator]
        found: dict[str, int] = grouped(network, matcher, reverse=True)
    elif type(network).__module__.startswith("fastdynat.models."):
        found = _depths_by_block(network)
    else:
        raise UserError(
            f"layer_decay: a {type(network).__name__} does not report the depth of its layers; use timm:NAME "
            "or a built-in network, or give your own a group_matcher like those of timm"
        )
    return {prefix + name: depth for name, depth in found.items()}


def _depths_by_block(network: nn.Module) -> dict[str, int]:
    modules = dict(network.named_modules())
    depths: dict[str, int] = {}
    depth, block = 0, ""
    for name, _ in network.named_parameters():
        within = _block_of(name, modules)
        if within != block and not is_norm(modules.get(within)):
            depth, block = depth + 1, within
        depths[name] = depth
    first = min(depths.values())  # 1 where the network begins with a block
    return {name: found - first for name, found in depths.items()}


def _block_of(name: str, modules: dict[str, nn.Module]) -> str:
    """The member of the outermost nn.Sequential that the parameter is in; "" outside of all."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        if isinstance(modules[".".join(parts[:end])], nn.Sequential):
            return ".".join(parts[: end + 1])
    return ""


def head_parameters(module: nn.Module) -> set[str]:
    """The names of the parameters of the last linear layer of `module`.

    Raises:
        UserError: it ends in another layer.
    """
    named = [(name, layer) for name, layer in module.named_modules() if [*layer.parameters(recurse=False)]]
    name, last = named[-1]
    if not isinstance(last, nn.Linear):
        raise UserError(
            f"head_lr_scale: the last layer, {name}, is a {type(last).__name__}, not a Linear; leave it out"
        )
    return {f"{name}.{key}" for key, _ in last.named_parameters(recurse=False)}
