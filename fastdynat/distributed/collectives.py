"""Collectives inside a network: operators that torch.compile keeps whole, and in their order.

Ranks whose shards differ in size compile different code. The operators have the effect "ordered", so that no
compiler moves one past another: on every rank they run in the order of the program.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch._library.effects import EffectType

from fastdynat.distributed.world import batch_world, world

_apart = False


@contextmanager
def without_collectives() -> Iterator[None]:
    """Context in which the operators of this module take this rank for the only one that has images.

    For passes that other ranks may not make, as the check of compiled code at a new shape: what runs is the
    same code, and nothing waits for another rank.
    """
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


def _alone() -> bool:
    """True where this process has the whole batch; read when an operator runs, not when it is compiled."""
    return _apart or batch_world().alone


def _gather(local: Tensor) -> Tensor:
    everywhere = local.new_zeros(world().size, len(local))
    if _alone():
        everywhere[0] = local
    else:
        dist.all_gather_into_tensor(everywhere.view(-1), local)  # gloo wants the dimensions of `local`
    return everywhere


def _sum(local: Tensor) -> Tensor:
    total = local.clone()
    if not _alone():
        dist.all_reduce(total)
    return total


def _register(name: str, run: Callable[[Tensor], Tensor], fake: Callable[[Tensor], Tensor]) -> None:
    qualified = f"fastdynat::{name}"
    torch.library.define(qualified, "(Tensor local) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "default", run)
    torch.library.register_fake(qualified, fake)
    torch.library._register_effectful_op(qualified, EffectType.ORDERED)


_register("gather_over_ranks", _gather, lambda local: local.new_empty(world().size, len(local)))
_register("sum_over_ranks", _sum, torch.empty_like)


# Only a compiler needs the registered operators; eager calls skip the dispatcher.
def gather_over_ranks(local: Tensor) -> Tensor:
    """The vectors `local` (n,) of all ranks as the rows of a (ranks, n) tensor; not differentiable.

    Where the batch is this rank's own, the other rows are 0.
    """
    if torch.compiler.is_compiling():
        return torch.ops.fastdynat.gather_over_ranks(local)
    return _gather(local)


def sum_over_ranks(local: Tensor) -> Tensor:
    """The sum of `local` over the ranks that share the batch; not differentiable."""
    return torch.ops.fastdynat.sum_over_ranks(local) if torch.compiler.is_compiling() else _sum(local)
