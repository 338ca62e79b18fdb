"""Ctrl-C, SIGTERM and SIGHUP as a request to finish the step, save and leave."""

import os
import signal
import threading
from signal import Signals
from types import FrameType, TracebackType
from typing import Any

from fastdynat.interrupts import STOPPING, in_child


class StopRequest:
    """While active, the first SIGINT, SIGTERM or SIGHUP only sets `signal`; a second one interrupts at once."""

    def __init__(self) -> None:
        self.signal: Signals | None = None
        self._previous: dict[Signals, Any] = {}
        self._pid = os.getpid()

    def __enter__(self) -> "StopRequest":
        # Only the main thread may set handlers; elsewhere (a notebook's worker) the caller's stay in force.
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if signal.getsignal(number) == signal.SIG_IGN and number == signal.SIGHUP:
                    continue  # nohup: the run is to outlive its terminal
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if in_child(self._pid, number):
            return
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = Signals(number)

    def requested(self) -> bool:
        return self.signal is not None
