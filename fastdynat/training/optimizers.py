"""Optimisers of a run: SGD over the parameters of each network, at a rate that a captured step reads anew."""

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import SGD

from fastdynat.training.cycled_sgd import CycledSGD
from fastdynat.training.resolved_config import ResolvedOptim

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)  # batch and instance norm are _NormBase


def build_optimizers(
    networks: dict[str, nn.Module], config: ResolvedOptim, lr: Tensor, *, cycled: bool = False
) -> list[SGD]:
    """SGD over all parameters of each network ("separate"), or one SGD over both ("joint").

    Args:
        lr: scalar tensor on the networks' device, which the schedule writes to: a captured step reads it anew
            at each replay.
        cycled: the caller will replace each group's momentum by such a tensor too.
    """
    groups = [_groups(module, config) for module in networks.values()]

    def sgd(members: list[dict[str, Any]]) -> SGD:
        usual: dict[str, Any] = {"lr": lr, "momentum": config.momentum, "nesterov": config.nesterov}
        usual["weight_decay"] = config.weight_decay
        # Fused: one pass over the parameters, and torch's only implementation that does not read a tensor
        # rate.
        optimizer = CycledSGD(members, **usual) if cycled else SGD(members, **usual, fused=True)
        if config.momentum > 0:
            # torch leaves the buffers uninitialised where its first step is skipped because fp16 overflowed.
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer

    return [sgd([*chain(*groups)])] if config.optimizers == "joint" else [sgd(group) for group in groups]


def _groups(module: nn.Module, config: ResolvedOptim) -> list[dict[str, Any]]:
    """The parameter groups of one network: normalisation layers apart where they have no weight decay."""
    if config.decay_norms:
        return [{"params": list(module.parameters())}]
    norms = {
        id(p)
        for layer in module.modules()
        if isinstance(layer, NORMS)
        for p in layer.parameters(recurse=False)
    }
    decayed = [p for p in module.parameters() if id(p) not in norms]
    rest = [p for p in module.parameters() if id(p) in norms]
    return [{"params": decayed}] + [{"params": rest, "weight_decay": 0.0}] * bool(rest)
