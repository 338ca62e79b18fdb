"""Record of the machine and versions of a run, one entry per start (environment.json)."""

import json
import os
import platform
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy
import torch
import torchvision

from fastdynat import __version__
from fastdynat.documents import read_json
from fastdynat.errors import UserError
from fastdynat.runs.atomic_files import write_text

UNUSED = "unused"


def cpu_name() -> str:
    """The processor's public name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe_environment() -> dict[str, Any]:
    """Machine and versions as plain JSON values; no host or user names."""
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else []
    )
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "fastdynat": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "cuda": torch.version.cuda,
        "cpu": f"{len(os.sched_getaffinity(0))}-core {cpu_name()}",
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def read_starts(path: Path) -> list[dict[str, Any]]:
    """The starts in `path` (environment.json), oldest first. Raises UserError where it cannot be read."""
    return read_json(path, list[dict[str, Any]], what="the list of a run's starts", remedy="remove it")


def record_start(
    path: Path,
    *,
    operators: str,
    on_cpu: bool = True,
    precision: str = "float32",
    winograd: str = UNUSED,
    processes: int = 1,
    draws: int = 0,
) -> list[str]:
    """Append this process to the list in `path` (environment.json).

    Returns, in words, the differences from the last start that make sums round in another order, or random
    numbers be others.

    Args:
        operators: the implementation of the fused operators in this process.
        on_cpu: whether the run computes on the CPU, where threads and processor count.
        precision: that of training; validation is in float32 without TF32.
        winograd: the rule by which layers are computed by Winograd's algorithm; `UNUSED` where none may be.
        processes: how many train together.
        draws: the version of the rule by which attacks draw; 0 is that of earlier versions.
    """
    starts: list[dict[str, Any]] = []
    with suppress(UserError):  # the first start, or a damaged list, which resuming does not need
        starts = read_starts(path)
    precisions = {"training": precision, "validation": "float32"}
    starts.append({**describe_environment(), "operators": operators, "precision": precisions})
    starts[-1] |= {"winograd": winograd, "command": sys.argv[1:], "processes": processes}
    starts[-1]["draws"] = draws
    write_text(path, json.dumps(starts, indent=2) + "\n")
    return _differences(*starts[-2:], on_cpu=on_cpu) if len(starts) > 1 else []


def _differences(before: dict[str, Any], now: dict[str, Any], *, on_cpu: bool) -> list[str]:
    """Differences between two starts, each with its remedy; an entry that is missing counts as unknown."""
    # No flag brings back a mixture such as "cpp, but eager for this one".
    mixed = "," in str(before.get("operators"))
    remedies = {"processes": "", "operators": "" if mixed else " (--kernels {} keeps them)", "torch": ""}
    remedies |= {"threads": " (OMP_NUM_THREADS={} keeps them)", "processor": ""} if on_cpu else {"gpus": ""}
    names = {"torch": "PyTorch changes", "processor": "the processor changes", "gpus": "the GPUs change"}
    # The number of cores beside the processor's name is not part of it.
    old, new = (
        {**start, "processor": str(start.get("cpu", "")).partition("-core ")[2]} for start in (before, now)
    )
    found = [
        f"{names.get(key, key + ' change')} from {old[key]} to {new[key]}{remedy.format(old[key])}"
        for key, remedy in remedies.items()
        if old.get(key) and old[key] != new[key]
    ]
    # A start without this entry was made by a version with another rule, used wherever this one is.
    rules = now["winograd"], before.get("winograd")
    if UNUSED not in rules and rules[0] != rules[1]:
        found.append("another rule than before says which layers Winograd's algorithm computes")
    if now["draws"] != before.get("draws", 0):
        found.append("the attacks of training draw other random numbers than in the version that began it")
    return found
