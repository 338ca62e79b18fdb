"""Rendezvous of the launched processes, their process group, and its end."""

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
    """Initialise the default process group of the launched processes; without a launcher return `ALONE`.

    CPU tensors go through gloo and CUDA tensors through NCCL, in one group. With "cuda" the process takes the
    GPU of its local rank. A process group that the caller's program has initialised is used as it is.

    Args:
        device_type: "cpu" or "cuda", the networks' device.
        minutes: time limit of the rendezvous and of every collective.

    Raises:
        UserError: a rank did not join in time, or the ranks' devices do not fit each other; on one rank. On
            each rank if the store of the rendezvous is gone, or the caller's group takes no CPU tensors.
        ToldElsewhere: on the other ranks.
    """
    if _grouped() or not launched():
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


def require_cpu_backend() -> None:
    """Raise UserError where the default process group, if there is one, cannot reduce tensors on the CPU."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    backends = dist.get_backend_config()
    if "cpu" not in (pair.partition(":")[0] for pair in backends.split(",")):
        raise UserError(
            f"the process group has the backend {backends}, which takes no tensors on the CPU; initialise it "
            'with init_process_group("cpu:gloo,cuda:nccl")'
        )


def _grouped() -> bool:
    """True within a process group that can be used."""
    require_cpu_backend()
    return dist.is_initialized()


def leave_world() -> None:
    """Wait for all ranks, then destroy the process group that `join_world` initialised."""
    session = present_session()
    if session is not None:
        session.leave(world().barrier)
        set_session(None)
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def joined_world(device: str, minutes: float) -> Iterator[World]:
    """Context with the process group of the launched processes; no effect without a launcher or when nested.

    After an error the session stays open, so that the end of the command can report to the other ranks.

    Args:
        device: cpu, cuda, cuda:N or auto, as in a configuration.
        minutes: as for `join_world`.

    Raises:
        UserError: as `join_world`; also for "cuda:N" with several processes.
    """
    if _grouped() or not launched():
        yield world()
        return
    if ":" in device and launched_size() > 1:
        raise UserError(
            f"device {device}: each of {launched_size()} processes takes the GPU of its local rank; "
            "use --device cuda"
        )
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    join_world(automatic if device == "auto" else device.partition(":")[0], minutes=minutes)
    yield world()
    leave_world()
