"""Timing alternatives against each other, for as long as it takes to tell them apart."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

Clock = Callable[[], float]
HOPELESS = 2.0  # a candidate this many times slower than the best is not timed again
MIN_ROUNDS, MAX_ROUNDS = 3, 20


def race(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 0.5,
    clock: Clock | None = None,
) -> dict[str, float]:
    """The least seconds per call of each of `calls` on the CPU, timed in turns: what disturbs the machine
    disturbs them all.

    The first call of each only warms it up, unless it alone tells that the candidate is hopeless. After each
    round those are left out that take more than twice the time of the best.

    Args:
        calls: by name, the surest first: what comes later is compared with it.
        seconds: stop after the round in which so much time has passed, but not before the third.
        clock: in seconds; None is `quiet_clock`.
    """
    clock = clock or quiet_clock()
    least: dict[str, float] = {}
    running, begin = dict(calls), clock()
    for name, call in calls.items():
        took = _once(call, clock)
        # A first call also makes its kernels, which takes milliseconds; a hundred times the best is no such
        # thing.
        if least and took > 100 * min(least.values()):
            least[name] = took
            del running[name]
            continue
        least[name] = _once(call, clock)
    for number in range(1, MAX_ROUNDS):
        best = min(least.values())
        running = {name: call for name, call in running.items() if least[name] <= HOPELESS * best}
        if len(running) < 2 or (number >= MIN_ROUNDS and clock() - begin > seconds):
            break
        for name, call in running.items():
            least[name] = min(least[name], _once(call, clock))
    return least


@contextmanager
def one_thread() -> Iterator[None]:
    """A block that computes on one of torch's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def quiet_clock() -> Clock:
    """A clock that other processes do not advance, where there is one: the time that this thread computed.

    With several threads there is none, as those that wait for others compute as well; rounds and the least of
    them must do.
    """
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def _once(call: Callable[[], object], clock: Clock) -> float:
    begin = clock()
    call()
    return clock() - begin
