"""Ctrl-C, SIGTERM and SIGHUP outside of what saves at them: one line and the usual exit code."""

import os
import signal
import threading
from abc import ABC, abstractmethod
from signal import Signals
from types import FrameType, TracebackType
from typing import Any, Self

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def in_child(pid: int, number: int) -> bool:
    """In a process that was forked from `pid`, take the signal `number` as if there were no handler; whether
    it is one.
    """
    if os.getpid() == pid:
        return False
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    return True


class Handlers(ABC):
    """While active, SIGINT, SIGTERM and SIGHUP are this object's, but for those that are left to others.

    Attributes:
        signal: the last one that came; None if none did.
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
        """Whether `number`, whose present handler is `handler`, becomes this object's."""

    @abstractmethod
    def received(self, number: Signals) -> None:
        """What `number` does."""


class Interruption(Handlers):
    """While active, each of the signals raises KeyboardInterrupt, where nobody else has a handler for it.

    What a library makes of the exception is still its work.
    """

    def takes_over(self, number: Signals, handler: Any) -> bool:
        return handler in (signal.SIG_DFL, signal.default_int_handler)  # an ignored one stays ignored: nohup

    def received(self, number: Signals) -> None:
        self.signal = number
        raise KeyboardInterrupt

    @property
    def code(self) -> int:
        """The exit code, 128 + the signal's number."""
        return 128 + (self.signal or signal.SIGINT)
