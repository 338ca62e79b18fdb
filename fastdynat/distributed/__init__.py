"""Several processes that train or evaluate as one, on PyTorch's own launcher, rendezvous and collectives.

`world`: the processes of a program started by ``torchrun``, and their sums; `shares`: how a batch is dealt
out to them; `flat`: one collective for many tensors.

Every rank keeps whole networks and the same state. The shards of a batch differ; sums over the ranks put
together what one process would have. Nothing here wraps a module, so the attack's backward passes communicate
nothing.
"""

from fastdynat.distributed.world import (
    ALONE,
    World,
    batch_world,
    join_world,
    launched,
    leave_world,
    replicated_batch,
    world,
)

__all__ = [
    "ALONE",
    "World",
    "batch_world",
    "join_world",
    "launched",
    "leave_world",
    "replicated_batch",
    "world",
]
