"""Optimisers of a run, at rates in tensors that a captured step reads anew, and their states."""

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from fastdynat.config.optimizer_kinds import SGD_KIND, usual_betas, usual_decay, usual_eps
from fastdynat.distributed import world
from fastdynat.training.cycled_sgd import CycledSGD
from fastdynat.training.lion import Lion
from fastdynat.training.parameter_groups import parameter_groups
from fastdynat.training.resolved_config import ResolvedOptim


def build_optimizers(
    networks: dict[str, nn.Module],
    config: ResolvedOptim,
    lr: Tensor,
    *,
    cycled: bool = False,
) -> list[Optimizer]:
    """An optimiser over all trained parameters of each network ("separate"), or one over both ("joint").

    With `config.zero1` and several processes, each of them is torch's ZeroRedundancyOptimizer around it.

    Args:
        lr: scalar tensor on the networks' device, which the schedule writes to: a captured step reads it anew
            at each replay.
        cycled: the caller will replace each group's momentum by such a tensor too.
    """
    groups = [parameter_groups(module, config) for module in networks.values()]
    sharded = config.zero1 and not world().alone
    kind, usual = _kind(config, cycled)

    def build(members: list[dict[str, Any]]) -> Optimizer:
        make: Callable[..., Optimizer] = _sharded(kind) if sharded else kind
        optimizer = make(members, lr=lr, **usual)
        _begin_state(local_part(optimizer), config)
        return optimizer

    return [build([*chain(*groups)])] if config.optimizers == "joint" else [build(group) for group in groups]


def _kind(config: ResolvedOptim, cycled: bool) -> tuple[type[Optimizer], dict[str, Any]]:
    """The class for `config`, and its arguments without parameters and rate."""
    usual: dict[str, Any] = {"weight_decay": usual_decay(config)}
    # Fused: one pass over the parameters, and torch's only implementation that reads the rate from a tensor.
    if config.opt == SGD_KIND:
        usual |= {"momentum": config.momentum, "nesterov": config.nesterov}
        return (CycledSGD, usual) if cycled else (SGD, {**usual, "fused": True})
    usual["betas"] = usual_betas(config)
    if config.opt == "lion":
        return Lion, usual
    # Capturable: torch refuses to capture another update of Adam, although its fused one is always the same.
    usual |= {"eps": usual_eps(config), "fused": True, "capturable": True}
    return AdamW if config.opt == "adamw" else Adam, usual


def _sharded(kind: type[Optimizer]) -> Callable[..., Optimizer]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return partial(ZeroRedundancyOptimizer, optimizer_class=kind)


def _begin_state(optimizer: Optimizer, config: ResolvedOptim) -> None:
    """Make the state of every parameter, which torch would make in its first step.

    A captured step needs it before, and torch's SGD leaves it uninitialised where its first step is skipped
    because fp16 overflowed.
    """
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        zeros = partial(torch.zeros_like, parameter, memory_format=torch.preserve_format)
        if config.opt == SGD_KIND:
            made = {"momentum_buffer": zeros()} if config.momentum > 0 else {}
        elif config.opt == "lion":
            made = {"exp_avg": zeros()}
        else:
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            made = {"step": step, "exp_avg": zeros(), "exp_avg_sq": zeros()}
        if made:
            optimizer.state[parameter] = made


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
    # torch's sharded optimiser writes into the mapping that it is given, keeps a second copy of its part, and
    # leaves scalars, Adam's numbers of steps, on the CPU, where its fused update does not read them.
    optimizer.load_state_dict({**state, "state": dict(state["state"])})
    optimizer.state.clear()
    for parameter, kept in local.state.items():
        local.state[parameter] = {key: value.to(parameter.device) for key, value in kept.items()}
