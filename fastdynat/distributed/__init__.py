"""Training and evaluation on several processes, with PyTorch's launcher, rendezvous and collectives.

`world`: rank, world size and collectives; `shares`: the split of a batch over the ranks; `flat`: one
collective for many tensors; `joining`: the rendezvous (`store`, `members`) and the process group; `session`:
heartbeats, and failures reported to all ranks; `decisions`: decisions that are the same on all ranks.

Every rank holds whole networks and the same state, and computes a shard of each batch; sums over the ranks
are those of one process. No module is wrapped, so the attack's backward passes communicate nothing.
"""

from fastdynat.distributed.decisions import all_can, first_decides, in_turns, name_of, require_alike
from fastdynat.distributed.joining import join_world, joined_world, leave_world, require_cpu_backend
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
    "require_cpu_backend",
    "world",
]
