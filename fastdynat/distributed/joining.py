"""Joining the processes that a launcher has started, and leaving them."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from fastdynat.distributed.members import member_here, unfit
from fastdynat.distributed.session import Session, ending_with_launcher, present_session, set_session
from fastdynat.distributed.store import below, find_each_other, open_store
from fastdynat.distributed.world import World, collective_calls, world
from fastdynat.errors import ToldElsewhere, UserError, first_line
from fastdynat.launch import MINUTES, launched, launched_rank, launched_size, place_of
from fastdynat.machine.cores import keep_to_own_cores


def join_world(device_type: str, *, minutes: float = MINUTES) -> World:
    """Join the processes that the launcher started, or return `ALONE` where it started none.

    Tensors on the CPU go through gloo and those on GPUs through NCCL, in one group. On a GPU the process
    takes the one that LOCAL_RANK numbers. A group that the caller's program has made is used as it is.

    Args:
        device_type: "cpu" or "cuda", the networks' device.
        minutes: time limit of the rendezvous and of every collective.

    Raises:
        UserError: a rank did not come in time, or the ranks' devices do not fit each other; on one rank. On
            each rank where the store of the rendezvous is gone.
        ToldElsewhere: on the others.
    """
    if dist.is_initialized() or not launched():
        return world()
    keep_to_own_cores()
    rank, size, limit = launched_rank(), launched_size(), timedelta(minutes=minutes)
    with ending_with_launcher():
        store = open_store(rank, limit)
        try:
            name, members = find_each_other(store, member_here(rank, device_type), size, limit)
        except RuntimeError as error:  # the process that kept the store has ended
            raise UserError(f"{place_of(rank)} lost the rendezvous: {first_line(error)}") from None
    if problem := unfit(members):
        raise UserError(problem) if rank == 0 else ToldElsewhere(problem)
    own, watched = (below(name, connection) for connection in (store, store.clone()))
    session = Session(own, watched, members, members[rank], minutes)
    session.calls = collective_calls
    set_session(session)
    session.start()
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    group = below("group", below(name, store.clone()))
    dist.init_process_group(backend, store=group, rank=rank, world_size=size, timeout=limit)
    return world()


def leave_world() -> None:
    """Leave the group that `join_world` joined, when all ranks have come here."""
    session = present_session()
    if session is not None:
        session.leave(world().barrier)
        set_session(None)
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def joined_world(device: str, minutes: float) -> Iterator[World]:
    """Context of the launcher's processes; without a launcher, or inside such a context, nothing happens.

    After an error the session stays: what ends the process tells the others (`fastdynat.commands`).

    Args:
        device: cpu, cuda, cuda:N or auto, as in a configuration.
        minutes: as for `join_world`.

    Raises:
        UserError: as `join_world`; also for the number of one GPU where there are several processes.
    """
    if dist.is_initialized() or not launched():
        yield world()
        return
    if ":" in device and launched_size() > 1:
        raise UserError(
            f"device {device}: each of {launched_size()} processes takes the GPU of its LOCAL_RANK; "
            "use --device cuda"
        )
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    join_world(automatic if device == "auto" else device.partition(":")[0], minutes=minutes)
    yield world()
    leave_world()
