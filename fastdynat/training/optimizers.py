"""Optimisers of a run: SGD over the parameters of each network, at a rate that a captured step reads anew."""

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import SGD, Optimizer

from fastdynat.distributed import world
from fastdynat.training.cycled_sgd import CycledSGD
from fastdynat.training.resolved_config import ResolvedOptim

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)  # batch and instance norm are _NormBase


def build_optimizers(
    networks: dict[str, nn.Module],
    config: ResolvedOptim,
    lr: Tensor,
    *,
    cycled: bool = False,
) -> list[Optimizer]:
    """SGD over all parameters of each network ("separate"), or one SGD over both ("joint").

    With `config.zero1` and several processes, each of them is torch's ZeroRedundancyOptimizer around SGD.

    Args:
        lr: scalar tensor on the networks' device, which the schedule writes to: a captured step reads it anew
            at each replay.
        cycled: the caller will replace each group's momentum by such a tensor too.
    """
    groups = [_groups(module, config) for module in networks.values()]
    kind: type[SGD] = CycledSGD if cycled else SGD
    usual: dict[str, Any] = {"lr": lr, "momentum": config.momentum, "nesterov": config.nesterov}
    usual["weight_decay"] = config.weight_decay
    # Fused: one pass over the parameters, and torch's only implementation that does not read a tensor rate.
    usual |= {} if cycled else {"fused": True}
    sharded = config.zero1 and not world().alone

    def sgd(members: list[dict[str, Any]]) -> Optimizer:
        optimizer = _sharded(members, kind, usual) if sharded else kind(members, **usual)
        if config.momentum > 0:
            # torch leaves the buffers uninitialised where its first step is skipped because fp16 overflowed.
            local = local_part(optimizer)
            for parameter in (p for group in local.param_groups for p in group["params"]):
                local.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer

    return [sgd([*chain(*groups)])] if config.optimizers == "joint" else [sgd(group) for group in groups]


def _sharded(members: list[dict[str, Any]], kind: type[SGD], usual: dict[str, Any]) -> Optimizer:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(members, optimizer_class=kind, **usual)


def local_part(optimizer: Optimizer) -> Optimizer:
    """The optimiser of this process's part of the parameters: `optimizer` itself, unless it is sharded."""
    local: Optimizer = getattr(optimizer, "optim", optimizer)
    return local


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """The state of `optimizer` as one process has it; every rank must call this.

    Of a sharded optimiser rank 0 gets the whole state, and the others an empty one.
    """
    if local_part(optimizer) is optimizer:
        return optimizer.state_dict()
    optimizer.consolidate_state_dict(to=0)  # type: ignore[attr-defined]
    return optimizer.state_dict() if world().first else {}


def load_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Restore what `optimizer_state` returned on rank 0, whether it was sharded or not."""
    local = local_part(optimizer)
    if local is optimizer:
        optimizer.load_state_dict(state)
        return
    # torch's sharded optimiser writes into the mapping that it is given, and keeps a second copy of its part.
    optimizer.load_state_dict({**state, "state": dict(state["state"])})
    optimizer.state.clear()


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
