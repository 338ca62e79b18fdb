"""One collective for many tensors: they are copied into one flat tensor, summed, and copied back."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdynat.distributed.world import PendingSum, World


@dataclass(frozen=True)
class FlatSum:
    """A pending all-reduce of many tensors; `finish` waits for it and writes the sums into the tensors."""

    tensors: list[list[Tensor]]
    flat: list[Tensor]
    pending: list[PendingSum]

    @torch.no_grad()
    def finish(self) -> None:
        for group, flat, pending in zip(self.tensors, self.flat, self.pending, strict=True):
            pending.wait()
            pieces = flat.split([tensor.numel() for tensor in group])
            torch._foreach_copy_(group, [p.view(t.shape) for p, t in zip(pieces, group, strict=True)])


@torch.no_grad()
def start_flat_sum(tensors: Sequence[Tensor], world: World, *, scale: float = 1.0) -> FlatSum:
    """Begin to replace `tensors` by ``scale`` times their sums over the ranks: one collective per dtype.

    Every rank passes tensors of the same shapes and dtypes, in the same order.
    """
    if world.alone and scale == 1.0:
        return FlatSum([], [], [])
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    flat = [torch.cat([tensor.reshape(-1) for tensor in group]) for group in groups.values()]
    if scale != 1.0:
        torch._foreach_mul_(flat, scale)
    return FlatSum([*groups.values()], flat, [world.start_sum_(tensor) for tensor in flat])


def flat_sum(tensors: Sequence[Tensor], world: World, *, scale: float = 1.0) -> None:
    """Replace `tensors` in place by ``scale`` times their sums over the ranks."""
    start_flat_sum(tensors, world, scale=scale).finish()
