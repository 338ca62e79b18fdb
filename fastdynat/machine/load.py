"""CPU load of other processes: timings taken under a high one say little."""

import os
import time
from contextlib import suppress
from pathlib import Path


class OtherLoad:
    """CPU load of other processes since `__init__`."""

    def __init__(self) -> None:
        self._begin = _busy_seconds()

    def share(self) -> float | None:
        """Of all cores' time; None where the system does not tell."""
        end = _busy_seconds()
        if self._begin is None or end is None:
            return None
        busy, own, total = (b - a for a, b in zip(self._begin, end, strict=True))
        return round(max(0.0, busy - own) / total, 3) if total > 0 else 0.0


def free_cores() -> int:
    """Cores on which nothing wants to run at this moment beside the thread that asks; all where the system
    does not tell.

    Takes 10 ms: a thread that only looks after something runs in none or few of the moments.
    """
    cores = os.cpu_count() or 1
    with suppress(OSError, ValueError, IndexError):
        running = []
        for _ in range(5):
            running.append(int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0]))
            time.sleep(0.002)
        return cores - max(0, min(running) - 1)
    return cores


def _busy_seconds() -> tuple[float, float, float] | None:
    """(busy, this process's, all) seconds of the cores so far."""
    with suppress(OSError, ValueError):
        ticks = [int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        second = os.sysconf("SC_CLK_TCK")
        return (sum(ticks) - ticks[3] - ticks[4]) / second, sum(os.times()[:4]), sum(ticks) / second
    return None
