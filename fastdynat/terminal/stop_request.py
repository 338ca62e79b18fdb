"""Ctrl-C, SIGTERM and SIGHUP as a request to finish the step, save and stop."""

import signal
from signal import Signals
from types import TracebackType
from typing import Any, Self

from fastdynat.terminal.interrupts import Handlers

_active: list["StopRequest"] = []


class StopRequest(Handlers):
    """While active, the first SIGINT, SIGTERM or SIGHUP only sets `signal`; a second one interrupts at
    once.
    """

    def __enter__(self) -> Self:
        _active.append(self)
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        _active.remove(self)

    def takes_over(self, number: Signals, handler: Any) -> bool:
        return (
            number != signal.SIGHUP or handler != signal.SIG_IGN
        )  # nohup: the run is to outlive its terminal

    def received(self, number: Signals) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number

    def requested(self) -> bool:
        return self.signal is not None


def request_stop(number: Signals) -> bool:
    """Make the active `StopRequest`s see signal `number`, which another handler has received.

    Returns False if none is active. Repeated requests interrupt nothing.
    """
    for request in _active:
        request.signal = request.signal or number
    return bool(_active)
