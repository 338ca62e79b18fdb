"""What a run or a measurement ran on."""

import json
import os
import platform
import subprocess
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
from fastdynat.runs.files import write_text


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
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
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


def source_commit() -> str:
    """The commit of the checkout that this package is in, marked if tracked files differ from it; "unknown" for an installed
    copy."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # a virtual environment may lie inside a checkout
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (subprocess.CalledProcessError, FileNotFoundError):
        return "unknown"


def read_starts(path: Path) -> list[dict[str, Any]]:
    """The starts in `path` (environment.json), the first one first. Raises UserError where it cannot be read."""
    return read_json(path, list[dict[str, Any]], what="the list of a run's starts", remedy="remove it")


def record_start(path: Path, *, operators: str) -> str | None:
    """Append this process to the list in `path` (environment.json).

    operators: the implementation of the fused operators in this process. Returns that of the last start, None where unknown.
    """
    starts: list[dict[str, Any]] = []
    with suppress(UserError):  # the first start, or a list that nobody needs for resuming
        starts = read_starts(path)
    before = starts[-1].get("operators") if starts else None
    before = before if isinstance(before, str) else None
    starts.append({**describe_environment(), "operators": operators, "command": sys.argv[1:]})
    write_text(path, json.dumps(starts, indent=2) + "\n")
    return before
