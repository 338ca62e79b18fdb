"""Several processes that train or evaluate as one, on PyTorch's own launcher, rendezvous and collectives.

`world`: the processes of a program started by ``torchrun``, and their sums; `shares`: how a batch is dealt
out to them; `flat`: one collective for many tensors. `joining`: how they find each other (`store`,
`members`); `session`: failures told to all, and the watch over who is alive; `decisions`: what all ranks
decide alike.

Every rank keeps whole networks and the same state. The shards of a batch differ; sums over the ranks put
together what one process would have. Nothing here wraps a module, so the attack's backward passes communicate
nothing.
"""

from fastdynat.distributed.decisions import all_can, first_decides, in_turns, name_of, require_alike
from fastdynat.distributed.joining import join_world, joined_world, leave_world
from fastdynat.distributed.session import present_session
from fastdynat.distributed.world import ALONE, World, apart, batch_world, replicated_batch, world
from fastdynat.launch import launched

__all__ = [
    "ALONE",
    "World",
    "all_can",
    "apart",
    "batch_world",
    "first_decides",
    "in_turns",
    "join_world",
    "joined_world",
    "launched",
    "leave_world",
    "name_of",
    "present_session",
    "replicated_batch",
    "require_alike",
    "world",
]
