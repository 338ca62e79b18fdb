"""Decisions that all ranks make at the same step: to stop, to save, to look at the running means."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from signal import Signals

from fastdynat.distributed import World, present_session

SECONDS = 1.0  # between exchanges, and between looks at the device's running means, which wait for it
MOST_STEPS, GROWTH = 1000, 4  # steps between exchanges at most, and times as many as before


@dataclass(frozen=True)
class StepDecision:
    """The work to do after a step, beside the next one.

    Attributes:
        stop: the signal that asks for it.
        save: write a checkpoint.
        look: compute and show the means so far.
    """

    stop: Signals | None = None
    save: bool = False
    look: bool = False


class StepAgreement:
    """Decisions after each step of an epoch, the same on all ranks.

    One process decides by its clock. Several exchange their wishes at steps that all of them know: the next
    one is rank 0's choice, about a second ahead, and part of the exchange. Whether to save is rank 0's wish;
    a signal on any rank stops all.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._looked = self._exchanged = time.perf_counter()
        self._every = self._left = 1

    def after_step(self, signal: Signals | None, save_due: bool) -> StepDecision:
        """The decision after a step; every rank calls this after each of its steps.

        Args:
            signal: what has asked this process to stop.
            save_due: whether the time for a checkpoint has come.
        """
        if self._world.alone:
            now = time.perf_counter()
            look = now - self._looked > SECONDS
            self._looked = now if look else self._looked
            return StepDecision(signal, save_due, look)
        self._left -= 1
        return self._exchange(signal, save_due) if self._left == 0 else StepDecision()

    def _exchange(self, signal: Signals | None, save: bool) -> StepDecision:
        now = time.perf_counter()
        steps = round(self._every * SECONDS / max(now - self._exchanged, 1e-9))
        self._exchanged = now
        # The step just timed may be faster than the next ones: the number grows slowly and falls at once.
        steps = max(1, min(steps, GROWTH * self._every, MOST_STEPS))
        told = self._world.gather((signal, save, steps))
        self._every = self._left = told[0][2]
        stop = next((asked for asked, _, _ in told if asked is not None), None)
        return StepDecision(stop, told[0][1], look=True)


def stop_of_any_rank(requested: Callable[[], bool]) -> Callable[[], bool]:
    """A condition for work that ranks do at different speeds: this process, or another, was asked to stop."""
    session = present_session()
    if session is None:
        return requested

    def stopped() -> bool:
        if requested() and not session.stop_wanted:
            session.request_stop()
        return session.stop_wanted

    return stopped
