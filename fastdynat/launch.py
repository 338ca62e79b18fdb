"""The environment variables by which torchrun and SLURM launch processes; needs no torch."""

import os
import socket

# What torchrun sets for each process; other launchers (SLURM's, through submitit) set the same names.
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Default time limit for the rendezvous and for every collective (--rank-timeout).
MINUTES = 10.0
_BEGINNING = os.getpid(), os.getppid()


def launched() -> bool:
    """True if a launcher such as torchrun started this process, even as the only one."""
    return all(name in os.environ for name in VARIABLES)


def launched_rank() -> int:
    """The rank that the launcher gave this process; 0 without a launcher."""
    return _number("RANK") if launched() else 0


def launched_size() -> int:
    """The number of processes that the launcher started; 1 without a launcher."""
    return _number("WORLD_SIZE") if launched() else 1


def local_rank() -> int:
    """The rank of this process on its machine; 0 without a launcher."""
    return _number("LOCAL_RANK") if launched() else 0


def local_size() -> int:
    """The number of processes that the launcher started on this machine; 1 without a launcher."""
    return max(1, _number("LOCAL_WORLD_SIZE")) if launched() and "LOCAL_WORLD_SIZE" in os.environ else 1


def launcher_ended() -> bool:
    """True if this process's torchrun, which keeps the store and would end this process, has ended.

    Other launchers, a shell in the background among them, may end before their processes do.
    """
    pid, parent = _BEGINNING
    return "TORCHELASTIC_RUN_ID" in os.environ and os.getpid() == pid and os.getppid() != parent


def place_of(rank: int) -> str:
    """The name of `rank`, a process of this machine, for messages."""
    return f"rank {rank} ({socket.gethostname()})"


def _number(name: str) -> int:
    text = os.environ[name]
    return int(text) if text.isdecimal() and text.isascii() else 0
