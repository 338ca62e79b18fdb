"""The duration of an epoch of each method, and the number of epochs within a budget."""

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdynat.config import TrainConfig
from fastdynat.data import Batch, TrainSplit
from fastdynat.execution.fallbacks import SilentFallbacks
from fastdynat.methods.base import first_epoch
from fastdynat.ops import use_backend
from fastdynat.training import build_parts
from fastdynat.training.metrics import Averages
from fastdynat.training.parts import burn_in_step
from fastdynat.training.resolved_config import ResolvedConfig

PROBE_SECONDS = 2.0
STEPS_PER_LOOK = {"cpu": 1, "cuda": 10}  # at the clock: a GPU has to be waited for
WARM_STEPS = 5  # a CUDA graph is captured after three ordinary steps


def probe(config: ResolvedConfig[Any], split: TrainSplit, budget: float) -> dict[str, Any]:
    """The seconds of `config` until it trains, of a burn-in, first and later epoch; and the epochs within
    `budget`.

    First and later epochs are told apart where the attack has fewer steps early or weight perturbation begins
    later.
    """
    attack, burn_in = config.attack, config.optim.burn_in
    config = replace(config, optim=replace(config.optim, epochs=burn_in + 1))
    with use_backend(config.engine.kernels):
        if config.engine.compile != "off":
            _Timer(config, split).warm_up()  # fills the compiler's caches, where the run will find its code
        start, first = _Timer(config, split).epoch_seconds()
        later, burning = first, 0.0
        if attack.early_steps is not None or attack.awp_warmup > 0:
            at_the_end = replace(config, attack=replace(attack, early_steps=None, awp_warmup=0))
            again, later = _Timer(at_the_end, split).epoch_seconds()
            start += again
        if burn_in > 0:
            again, burning = _Timer(config, split, burn_in=True).epoch_seconds()
            start += again
    epochs = epochs_within(budget - start, first, later, config, burning)
    return {
        "epochs": epochs,
        "start_seconds": round(start, 4),
        "burn_in_epoch_seconds": round(burning, 4) if burn_in > 0 else None,
        "first_epoch_seconds": round(first, 4),
        "later_epoch_seconds": round(later, 4),
        "expected_seconds": round(start + _cost(epochs, first, later, config, burning), 2),
    }


def epochs_within(
    budget: float, first: float, later: float, config: TrainConfig[Any], burning: float = 0.0
) -> int:
    """The most epochs, burn-in included, within `budget` seconds, but at least 1 after the burn-in."""
    epochs = config.optim.burn_in + 1
    while _cost(epochs + 1, first, later, config, burning) <= budget:
        epochs += 1
    return epochs


def _cost(epochs: int, first: float, later: float, config: TrainConfig[Any], burning: float) -> float:
    attack, epochs = config.attack, epochs - config.optim.burn_in
    early = 0 if attack.early_steps is None else first_epoch(attack.early_share, epochs)
    early = max(early, min(attack.awp_warmup, epochs))
    return config.optim.burn_in * burning + early * first + (epochs - early) * later


class _Timer:
    """Steps of a run that is thrown away."""

    def __init__(self, config: ResolvedConfig[Any], split: TrainSplit, *, burn_in: bool = False) -> None:
        _, step, self._loader = build_parts(config, split, fallbacks=SilentFallbacks())
        before = burn_in_step(config, step) if burn_in else None
        self._step = before or step
        self._device = torch.device(config.engine.device)
        self._prepared = config.engine.compile != "off" or self._device.type == "cuda"

    def epoch_seconds(self) -> tuple[float, float]:
        """Seconds until the first epoch's steps have their full speed, beyond what they take then; and those
        of the epoch.
        """
        begin = self._now()
        warm_steps = self.warm_up()
        warming = self._now() - begin
        begin, averages, steps, taken = self._now(), Averages(), 0, 0.0
        while taken < PROBE_SECONDS:
            for batch in self._loader.epoch(0):
                averages.add(self._update(batch), len(batch.labels))
                steps += 1
                if (
                    steps % STEPS_PER_LOOK[self._device.type] == 0
                    and (taken := self._now() - begin) >= PROBE_SECONDS
                ):
                    break
            taken = self._now() - begin
        start = max(0.0, warming - warm_steps * taken / steps) if self._prepared else 0.0
        return start, taken / averages.images * self._loader.epoch_images

    def warm_up(self) -> int:
        """Step on both shapes of batch until all code for them is there; returns the number of steps."""
        self._step.start_epoch(0)
        starts = {0, self._loader.steps_per_epoch - 1} if self._prepared else {0}
        repeats = WARM_STEPS if self._prepared else 1
        for start in starts:
            batch = next(iter(self._loader.epoch(0, start)))
            for _ in range(repeats):
                self._update(batch)
        return len(starts) * repeats

    def _update(self, batch: Batch) -> dict[str, Tensor]:
        self._step.global_step = 0  # the rate of the schedule's first step
        return self._step(batch)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
