"""A context in which waiting for the GPU is intended, for callers of `torch.cuda.set_sync_debug_mode`."""

import warnings
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
    if before == 0:
        yield
        return
    _set_mode(0)
    try:
        yield
    finally:
        _set_mode(before)


def _set_mode(mode: int) -> None:
    """Set torch's mode, without its warning that the mode is a prototype."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode", UserWarning)
        torch._C._cuda_set_sync_debug_mode(mode)
