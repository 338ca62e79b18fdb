"""Activation checkpointing (Chen et al. 2016, arXiv 1604.06174) of trained networks, --grad-checkpointing.

Between forward and backward pass only the inputs of a network's blocks are kept; the backward pass computes
each block again before it takes its gradient. The second time a block draws the same random numbers and
starts from the same buffers, which then stay as they are: gradients and running statistics equal those of a
plain step.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdynat.attack_engine.network_comparison import preserve_rng
from fastdynat.errors import UserError

LISTS = (nn.Sequential, nn.ModuleList)


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The blocks of `network` that are computed again one by one: the elements of its stages.

    A stage is a list of modules that have parameters and parts. Where a network has none, its blocks are its
    parts; a network of single layers has no blocks.
    """
    found = _blocks(network)
    while len(found) == 1:
        found = _blocks(found[0])
    return found


def _blocks(module: nn.Module) -> list[nn.Module]:
    found = []
    for child in module.children():
        if not _has_parts(child):
            continue
        found += _blocks(child) if type(child) in LISTS or _has_stage(child) else [child]
    return found


def _has_parts(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and any(True for _ in module.parameters())


def _has_stage(module: nn.Module) -> bool:
    """True if a list in `module` holds two blocks of a class that has a forward pass of its own."""
    for part in module.modules():
        if type(part) in LISTS:
            kinds = [type(e) for e in part.children() if _has_parts(e)]
            own = [kind for kind in kinds if kind.forward not in (nn.Sequential.forward, nn.Module.forward)]
            if len(own) > len(set(own)):
                return True
    return False


def checkpoint_activations(network: nn.Module, example: Tensor) -> int:
    """Let each block of `network` forget its activations in passes with gradients; returns their number.

    Args:
        network: a network that nothing else looks at: its blocks get a forward pass of their own instance.
        example: (2, C, H, W) images, with which a network that draws random numbers is found out.

    Raises:
        UserError: it has no blocks.
    """
    blocks = blocks_of(network)
    if not blocks:
        name = type(getattr(network, "net", network)).__name__
        raise UserError(
            f"--grad-checkpointing: {name} has no blocks to recompute, only single layers; leave it out"
        )
    draws = _draws(network, example)
    for block in blocks:
        block.forward = partial(_checkpointed, block, block.forward, draws)
    return len(blocks)


def _checkpointed(
    block: nn.Module, forward: Callable[..., Any], draws: bool, *args: Any, **kwargs: Any
) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": draws}
    if not torch.compiler.is_compiling():  # compiled code recomputes without side effects
        options["context_fn"] = partial(_contexts, block)
    return checkpoint(forward, *args, **options, **kwargs)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _Buffers(block)


class _Buffers(AbstractContextManager[None]):
    """Context in which `block` has its present buffers again, as copies: no pass moves its own ones.

    Batch norm's running statistics, and whatever else a module keeps there and moves.
    """

    def __init__(self, block: nn.Module) -> None:
        self._own = [(m, name, b) for m in block.modules() for name, b in m._buffers.items() if b is not None]
        self._values = [buffer.detach().clone() for _, _, buffer in self._own]

    def __enter__(self) -> None:
        for (module, name, _), value in zip(self._own, self._values, strict=True):
            module._buffers[name] = value.clone()

    def __exit__(self, *error: object) -> None:
        for module, name, buffer in self._own:
            module._buffers[name] = buffer


def _draws(network: nn.Module, example: Tensor) -> bool:
    """True if a pass in train mode takes random numbers, or that cannot be found out.

    Without, no generator's state is stored: a captured CUDA graph cannot read it.
    """
    device = example.device

    def state() -> Tensor:
        return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()

    with preserve_rng(device), torch.no_grad(), _Buffers(network):
        before = state()
        try:
            network(example)
        except Exception:  # of foreign code, which may raise anything
            return True
        return not torch.equal(before, state())
