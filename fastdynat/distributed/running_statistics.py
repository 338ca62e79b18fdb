"""Averaging of batch norm's running statistics over ranks that have updated them from their own shards."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fastdynat.distributed.world import World


@torch.no_grad()
def average_statistics(networks: Iterable[nn.Module], world: World, *, weight: float) -> None:
    """Make the floating-point buffers of `networks` equal on all ranks, in one collective.

    Buffers of normalisation layers (running means and variances) are averaged over the ranks. Other
    floating-point buffers, which change in training only in a user's own modules, are copied from rank 0.
    Counters (``num_batches_tracked``) are already equal, because every rank makes the same passes.

    The sum is taken in float64, so that a float32 buffer that is equal on all ranks keeps its bits however
    often this is called.

    Args:
        networks: the same on every rank.
        weight: of this rank's shard in the mean, `Share.weight`; these add up to 1 over the ranks.
    """
    if world.alone:
        return
    averaged, copied = _floating_buffers(networks)
    if not averaged and not copied:
        return
    pieces = [weight * buffer.double().reshape(-1) for buffer in averaged]
    # Not times 0.0 on the other ranks, which turns infinite values, as in an attention mask, into NaN.
    pieces += [(b if world.first else torch.zeros_like(b)).double().reshape(-1) for b in copied]
    buffers = [*averaged, *copied]
    flat = world.sum_(torch.cat(pieces))
    means = flat.split([buffer.numel() for buffer in buffers])
    torch._foreach_copy_(buffers, [m.view(b.shape) for m, b in zip(means, buffers, strict=True)])


def _floating_buffers(networks: Iterable[nn.Module]) -> tuple[list[Tensor], list[Tensor]]:
    """The buffers of normalisation layers and those of other modules, each tensor once."""
    averaged: dict[int, Tensor] = {}
    copied: dict[int, Tensor] = {}
    for module in (module for network in networks for module in network.modules()):
        found = averaged if isinstance(module, _NormBase) else copied
        found |= {id(b): b for b in module.buffers(recurse=False) if b.is_floating_point()}
    return [*averaged.values()], [b for key, b in copied.items() if key not in averaged]
