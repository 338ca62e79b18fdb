"""A context in which waiting for the GPU is intended, for callers of `torch.cuda.set_sync_debug_mode`."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def waits_on_purpose() -> Iterator[None]:
    """A context (or decorator) in which torch neither warns nor raises where the host waits for a GPU.

    For comparisons that are made once. The mode (`torch.cuda.set_sync_debug_mode`) is the process's, not the
    thread's.
    """
    if not torch.cuda.is_initialized():
        yield
        return
    before = torch._C._cuda_get_sync_debug_mode()
    torch._C._cuda_set_sync_debug_mode(0)  # torch.cuda's own warns that this is a prototype
    try:
        yield
    finally:
        torch._C._cuda_set_sync_debug_mode(before)
