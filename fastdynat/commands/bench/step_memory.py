"""The saving of activation checkpointing: a training step's peak memory with and without it, and its time."""

import os
import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import fastdynat
from fastdynat.commands.bench.rows import BenchRow, BenchSetup, asked_step
from fastdynat.commands.bench.work import engine_step
from fastdynat.data import DatasetInfo
from fastdynat.data.random_images import random_split
from fastdynat.machine.peak_memory import PeakMemory
from fastdynat.terminal.consoles import AS_IS
from fastdynat.training.resolved_config import ResolvedConfig

SWITCH = "grad_checkpointing"
STEPS = 2  # the second one has the optimiser's state


def checkpointing_values(setup: BenchSetup, rows: Sequence[BenchRow]) -> dict[str, Any] | None:
    """Peak bytes and median seconds of a step with and without it; None where they were not compared.

    On the CPU each peak is measured in a process of its own: what other rows have freed may be used again,
    and would not show.
    """
    turned = next((row for row in rows if row.plan.switch == SWITCH), None)
    asked = asked_step(rows)
    if turned is None or asked is None:
        return None
    engine = setup.full.engine
    found: dict[str, Any] = {}
    for row, on in ((asked, engine.grad_checkpointing), (turned, not engine.grad_checkpointing)):
        peak = row.peak_memory
        if not engine.on_gpu:
            config = replace(setup.full, engine=replace(engine, grad_checkpointing=on))
            peak = peak_of_process(config, setup.split.info)
        found["with" if on else "without"] = {"peak_bytes": peak, "seconds": row.samples.median}
    return found


def peak_of_process(config: ResolvedConfig[Any], info: DatasetInfo) -> int | None:
    """Peak bytes of networks, optimiser and step of `config` on random images; None where it is not known."""
    source = str(Path(fastdynat.__file__).parents[1])
    path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import measure_own; measure_own()"],
        input=pickle.dumps((config, info)),
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        check=True,
    )
    return int(done.stdout) or None


def measure_own() -> None:
    """In a process of its own: read a configuration from the standard input, print the peak bytes."""
    config, info = pickle.load(sys.stdin.buffer)
    split = random_split(info, config.data.batch_size, config.engine.seed, STEPS)
    memory = PeakMemory(torch.device(config.engine.device))
    call = engine_step(config, split).call
    for _ in range(STEPS):
        call()
    print(memory.bytes() or 0)


def print_checkpointing(values: Mapping[str, Any], console: Console) -> None:
    """Print the comparison in one line."""
    on, off = values["with"], values["without"]
    if on["peak_bytes"] is None or off["peak_bytes"] is None:
        return
    console.print(
        f"\n--grad-checkpointing: peak memory of a step {on['peak_bytes'] / 2**20:,.0f} MiB with it, "
        f"{off['peak_bytes'] / 2**20:,.0f} MiB without; {on['seconds'] / off['seconds']:.2f} times the time",
        **AS_IS,
    )
