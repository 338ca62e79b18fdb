"""Peak memory of a piece of work."""

import ctypes
from contextlib import suppress
from pathlib import Path

import torch


class PeakMemory:
    """Most bytes held at once since `__init__`: of the GPU's allocator, or resident in this process (not in
    its workers).

    Attributes:
        exact: whether the system let the mark be set back; otherwise the process's peak is that of its whole
            life so far.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self.exact = device if device.type == "cuda" else None, True
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before: int | None = torch.cuda.memory_allocated(self._device)
            return
        _give_back()
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # not Linux, or a sandbox that forbids it
            self.exact = False
        self._before = _status_bytes("VmRSS")

    def peak(self) -> int | None:
        """All that was held, also from before. None where the system does not tell."""
        return (
            _status_bytes("VmHWM") if self._device is None else torch.cuda.max_memory_allocated(self._device)
        )

    def bytes(self) -> int | None:
        """Peak bytes above those held before; None where the system does not tell."""
        peak = self.peak()
        return None if self._before is None else (peak or self._before) - self._before


def _give_back() -> None:
    """Return freed memory to the system: what the work takes of it would not show otherwise."""
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(key: str) -> int | None:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return None
