"""Collectives inside a network: operators that torch.compile neither splits nor reorders.

Ranks whose shards differ in size compile different code. The operators have the effect "ordered", so a
compiler keeps them in the order of the program on every rank.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch._library.effects import EffectType

from fastdynat.distributed.world import batch_world


def _ranks() -> int:
    """The world size that code is compiled for, also inside `apart` and `replicated_batch`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _gather(local: Tensor) -> Tensor:
    rows = local.new_zeros(_ranks(), len(local))
    batch_world().gather_rows_(rows, local)
    return rows


def _sum(local: Tensor) -> Tensor:
    return batch_world().sum_(local.clone())


def _register(name: str, run: Callable[[Tensor], Tensor], fake: Callable[[Tensor], Tensor]) -> None:
    qualified = f"fastdynat::{name}"
    torch.library.define(qualified, "(Tensor local) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "default", run)
    torch.library.register_fake(qualified, fake)
    torch.library._register_effectful_op(qualified, EffectType.ORDERED)


_register("gather_over_ranks", _gather, lambda local: local.new_empty(_ranks(), len(local)))
_register("sum_over_ranks", _sum, torch.empty_like)


# Only a compiler needs the registered operators; eager calls skip the dispatcher.
def gather_over_ranks(local: Tensor) -> Tensor:
    """The vectors `local` (n,) of all ranks as the rows of a (ranks, n) tensor; not differentiable.

    Where this process has the whole batch (`batch_world`), all rows but the first are 0.
    """
    if torch.compiler.is_compiling():
        return torch.ops.fastdynat.gather_over_ranks(local)
    return _gather(local)


def sum_over_ranks(local: Tensor) -> Tensor:
    """The sum of `local` over the ranks that share the batch; not differentiable."""
    return torch.ops.fastdynat.sum_over_ranks(local) if torch.compiler.is_compiling() else _sum(local)
