"""Ctrl-C, SIGTERM and SIGHUP as a request to finish the step, save and stop."""

import signal
from signal import Signals
from typing import Any

from fastdynat.terminal.interrupts import Handlers


class StopRequest(Handlers):
    """While active, the first SIGINT, SIGTERM or SIGHUP only sets `signal`; a second one interrupts at
    once.
    """

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
