"""The division of a machine's cores between the processes that a launcher has started on it."""

import os

import torch

from fastdynat.launch import local_size


def own_cores() -> int:
    """Number of cores for this process, at least 1.

    The processes of torchrun may all use the same cores; a launcher that started each one by itself, such as
    srun, may have given each cores of its own.
    """
    usable = len(os.sched_getaffinity(0))
    shared = usable if "TORCHELASTIC_RUN_ID" in os.environ else max(usable, os.cpu_count() or 1)
    return max(1, min(usable, shared // local_size()))


def keep_to_own_cores() -> None:
    """Limit torch to `own_cores` threads unless OMP_NUM_THREADS is set."""
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > own_cores():
        torch.set_num_threads(own_cores())
