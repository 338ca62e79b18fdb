"""How long an epoch of each method takes, and how many fit into a budget. What is trained meanwhile is thrown away."""

import math
import time
from dataclasses import replace
from typing import Any

import torch

from fastdynat.config import TrainConfig
from fastdynat.data import TrainLoader, TrainSplit
from fastdynat.engine import TrainStep, build_parts
from fastdynat.engine.metrics import Averages
from fastdynat.engine.resolve import Say
from fastdynat.ops import use_backend

PROBE_SECONDS = 2.0
STEPS_PER_LOOK = {"cpu": 1, "cuda": 10}  # at the clock: a GPU has to be waited for
WARM_STEPS = 5  # a CUDA graph is captured after three ordinary steps


def probe(config: TrainConfig[Any], split: TrainSplit, budget: float, say: Say) -> dict[str, Any]:
    """Seconds of a first and of a later epoch of the resolved `config`, and how many epochs fit into `budget` seconds.

    They are told apart where the attack has fewer steps early or weight perturbation begins later.
    """
    attack = config.attack
    total = attack.awp_warmup + 2
    config = replace(config, optim=replace(config.optim, epochs=total))
    _, step, loader = build_parts(config, split, say)
    with use_backend(config.engine.kernels):
        first = later = _epoch_seconds(step, loader, 0, config)
        if attack.early_steps is not None or attack.awp_warmup > 0:
            later = _epoch_seconds(step, loader, total - 1, config)
    epochs = epochs_within(budget, first, later, config)
    return {
        "epochs": epochs,
        "first_epoch_seconds": round(first, 4),
        "later_epoch_seconds": round(later, 4),
        "expected_seconds": round(_cost(epochs, first, later, config), 2),
    }


def epochs_within(budget: float, first: float, later: float, config: TrainConfig[Any]) -> int:
    """The most epochs that take at most `budget` seconds, but at least 1."""
    epochs = 1
    while _cost(epochs + 1, first, later, config) <= budget:
        epochs += 1
    return epochs


def _cost(epochs: int, first: float, later: float, config: TrainConfig[Any]) -> float:
    attack = config.attack
    early = 0 if attack.early_steps is None else math.ceil(attack.early_share * epochs)
    early = max(early, min(attack.awp_warmup, epochs))
    return early * first + (epochs - early) * later


def _epoch_seconds(step: TrainStep, loader: TrainLoader, epoch: int, config: TrainConfig[Any]) -> float:
    device, averages = torch.device(config.engine.device), Averages()
    step.start_epoch(epoch)
    _warm_up(step, loader, epoch, config)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    begin, steps, taken = now(), 0, 0.0
    while taken < PROBE_SECONDS:
        for batch in loader.epoch(epoch):
            step.global_step = 0  # the rate of the schedule's first step
            averages.add(step(batch), len(batch.labels))
            steps += 1
            if steps % STEPS_PER_LOOK[device.type] == 0 and (taken := now() - begin) >= PROBE_SECONDS:
                break
        taken = now() - begin
    return taken / averages.images * loader.num_images


def _warm_up(step: TrainStep, loader: TrainLoader, epoch: int, config: TrainConfig[Any]) -> None:
    """Steps on both shapes of batch until all code for them is there."""
    prepared = config.engine.compile != "off" or config.engine.device != "cpu"
    for start in (0, loader.steps_per_epoch - 1) if prepared else (0,):
        batch = next(iter(loader.epoch(epoch, start)))
        for _ in range(WARM_STEPS if prepared else 1):
            step.global_step = 0
            step(batch)
