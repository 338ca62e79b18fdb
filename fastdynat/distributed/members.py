"""The processes of a world: rank, host, pid and device of each, and a check that they can work together."""

import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from fastdynat.launch import local_rank


@dataclass(frozen=True)
class Member:
    """One process of a world.

    Attributes:
        device: "cpu" or "cuda".
        gpu: an identifier of the GPU that is unique on its host; "" on the CPU.
        problem: the reason that this process cannot use its device; "" if it can.
        attempt: a random identifier, new for each rendezvous that a process joins.
    """

    rank: int
    host: str
    pid: int
    device: str
    gpu: str = ""
    problem: str = ""
    attempt: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @property
    def dead(self) -> bool:
        """True if this process ran on this host and has ended; False if that cannot be determined."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
            with open(f"/proc/{self.pid}/stat", encoding="utf-8", errors="replace") as file:
                # A zombie has ended, but its parent has not collected its exit code yet.
                return file.read().rpartition(")")[2].split()[0] in ("Z", "X")
        except PermissionError:
            return False
        except (ProcessLookupError, FileNotFoundError):
            return True


def member_here(rank: int, device_type: str) -> Member:
    """This process as a member that computes on `device_type`; its GPU becomes torch's current device."""
    gpu, problem = _take_gpu() if device_type == "cuda" else ("", "")
    attempt = os.urandom(8).hex()
    return Member(rank, socket.gethostname(), os.getpid(), device_type, gpu, problem, attempt)


def _take_gpu() -> tuple[str, str]:
    """The identifier of this process's GPU, and the reason that it has none; one of them is ""."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # A launcher that shows each process its own GPU only leaves one to choose from.
    index = 0 if count == 1 else local_rank()
    if index >= count:
        have = f"this machine has {count}" if count else "it has none"
        return "", f"needs GPU {index}, but {have}"
    torch.cuda.set_device(index)
    return str(torch.cuda.get_device_properties(index).uuid), ""


def unfit(members: Sequence[Member]) -> str:
    """The first reason that `members` cannot work together, for a message; "" if there is none."""
    for member in members:
        if member.problem:
            return f"{member} {member.problem}; start one process per GPU, or use --device cpu"
    for member in members:
        if member.device != members[0].device:
            gpu, none = (member, members[0]) if member.device == "cuda" else (members[0], member)
            return f"{none} has no GPU, but {gpu} has one; use --device cpu, or GPUs on all machines"
    seen: dict[tuple[str, str], Member] = {}
    for member in members:
        if member.gpu and (other := seen.setdefault((member.host, member.gpu), member)) is not member:
            return f"{other} and {member} would share one GPU; start one process per GPU"
    return ""
