"""The part of this machine that is one process's, where a launcher has started several."""

import os


def local_ranks() -> int:
    """Number of processes that the launcher started on this machine; 1 without a launcher."""
    given = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(given)) if given.isdecimal() else 1


def own_cores() -> int:
    """Number of cores for this process, at least 1.

    The processes of torchrun may all use the same cores; a launcher that started each one by itself, such as
    srun, may have given each cores of its own.
    """
    usable = len(os.sched_getaffinity(0))
    shared = usable if "TORCHELASTIC_RUN_ID" in os.environ else max(usable, os.cpu_count() or 1)
    return max(1, min(usable, shared // local_ranks()))
