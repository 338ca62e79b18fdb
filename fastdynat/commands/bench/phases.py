"""The phases of a training step: what it does one after the other, each timed by itself."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fastdynat.commands.bench.stopwatch import Samples, Stopwatch
from fastdynat.data import Batch
from fastdynat.training import TrainStep

DATA, OTHER = "data", "other"
PHASES = (
    DATA,
    "guide (inner half)",
    "replica refresh",
    "attack",
    "outer forward",
    "outer backward",
    "optimiser",
    OTHER,
)


class _Clock:
    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self._inside = False

    def timed(self, phase: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn`, whose time counts as `phase`, unless another phase calls it."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return fn(*args, **kwargs)
            self._inside = True
            begin = self._watch.mark()
            try:
                return fn(*args, **kwargs)
            finally:
                self._spans[phase].append((begin, self._watch.mark()))
                self._inside = False

        return wrapped

    def seconds(self) -> dict[str, float]:
        """Per phase since the last call."""
        found = {
            name: sum(self._watch.seconds(*span) for span in spans) for name, spans in self._spans.items()
        }
        self._spans.clear()
        return found


@contextmanager
def _watched(step: TrainStep, clock: _Clock) -> Iterator[None]:
    owners = [
        (step, "_inner", PHASES[1]),
        (step.networks.attack, "refresh", PHASES[2]),
        (step.method, "perturb", PHASES[3]),
        (step.method, "outer", PHASES[4]),
        (step, "_backward", PHASES[5]),
        (step, "_update", PHASES[6]),
    ]
    for owner, name, phase in owners:
        setattr(owner, name, clock.timed(phase, getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, _ in owners:
            delattr(owner, name)


def time_phases(
    step: TrainStep, stream: Iterator[Batch], watch: Stopwatch, number: int
) -> dict[str, Samples]:
    """Seconds per phase of `number` warm steps. The step must be neither a captured graph nor on two streams:
    then its phases are no longer one after the other.
    """
    clock = _Clock(watch)
    taken: dict[str, list[float]] = {phase: [] for phase in PHASES}
    following = clock.timed(DATA, lambda: next(stream))
    with _watched(step, clock):
        for _ in range(number):
            whole = watch.time(lambda: step(following()))
            found = clock.seconds()
            found[OTHER] = max(0.0, whole - sum(found.values()))
            for phase in PHASES:
                taken[phase].append(found.get(phase, 0.0))
    return {phase: Samples(tuple(seconds)) for phase, seconds in taken.items()}
