"""Turns on a replica that several callers share."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Turns:
    """Contexts of one caller at a time, by thread, and on a GPU by stream.

    What a turn launches begins after all that the turn before it launched, on whatever stream that was: both
    write the replica's weights and the inputs of its graphs.
    """

    def __init__(self, device: torch.device) -> None:
        self._lock, self._device = threading.RLock(), device
        self._done: torch.cuda.Event | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            stream = self._stream()
            if stream is not None and self._done is not None:
                stream.wait_event(self._done)
            try:
                yield
            finally:
                if stream is not None:
                    self._done = stream.record_event()

    def _stream(self) -> torch.cuda.Stream | None:
        """The caller's stream; None on the CPU, and while it is captured: it may wait for nothing outside."""
        if self._device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return None
        return torch.cuda.current_stream(self._device)
