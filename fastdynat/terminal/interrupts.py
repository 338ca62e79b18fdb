"""Ctrl-C, SIGTERM and SIGHUP as KeyboardInterrupt, with the usual exit code."""

import os
import signal
import threading
from abc import ABC, abstractmethod
from signal import Signals
from types import FrameType, TracebackType
from typing import Any, Self

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def in_child(pid: int, number: int) -> bool:
    """Give signal `number` its default effect in a child forked from `pid`; returns True in such a child."""
    if os.getpid() == pid:
        return False
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    return True


class Handlers(ABC):
    """Signal handlers for SIGINT, SIGTERM and SIGHUP while active.

    Attributes:
        signal: the last signal received; None before the first.
    """

    def __init__(self) -> None:
        self.signal: Signals | None = None
        self._previous: dict[Signals, Any] = {}
        self._pid = os.getpid()

    def __enter__(self) -> Self:
        # Only the main thread may set handlers; elsewhere (a notebook's worker) the caller's stay in force.
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if self.takes_over(number, signal.getsignal(number)):
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not in_child(self._pid, number):
            self.received(Signals(number))

    @abstractmethod
    def takes_over(self, number: Signals, handler: Any) -> bool:
        """True where this object takes over signal `number` from `handler`."""

    @abstractmethod
    def received(self, number: Signals) -> None:
        """React to signal `number`."""


class Interruption(Handlers):
    """While active, each of the signals raises KeyboardInterrupt, where nobody else has a handler for it.

    A library may still replace the exception by its own.

    Attributes:
        only_noted: from now on signals only set `signal`, so that the reason of an end can be reported.
    """

    only_noted = False

    def takes_over(self, number: Signals, handler: Any) -> bool:
        return handler in (signal.SIG_DFL, signal.default_int_handler)  # an ignored one stays ignored: nohup

    def received(self, number: Signals) -> None:
        self.signal = number
        if not self.only_noted:
            raise KeyboardInterrupt

    @property
    def code(self) -> int:
        """The exit code, 128 + the signal's number."""
        return 128 + (self.signal or signal.SIGINT)
