"""Validation of a run: accuracy of the deployed network, clean and under PGD-10 at the evaluation radius."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from fastdynat.attack_engine.steps import usual_step
from fastdynat.attacks import parse_attack
from fastdynat.data import Images
from fastdynat.distributed import apart, world
from fastdynat.evaluation import KeptReplica, Measurement, Stopped, measure
from fastdynat.training.average_share import MOSTLY, first_share
from fastdynat.training.networks import NetworkSet
from fastdynat.training.resolved_config import ResolvedConfig

ATTACKS = ("clean", "pgd10")


class Validation:
    """Measures the deployed network on the validation `images`; keeps the attacked replica between calls."""

    def __init__(self, config: ResolvedConfig[Any], networks: NetworkSet, images: Images) -> None:
        self.images = images
        self._config, self._networks, self._replica = config, networks, KeptReplica()

    def accuracies(self, begin: Callable[[str], None], should_stop: Callable[[], bool]) -> dict[str, float]:
        """val_clean_acc and val_pgd10_acc, as shares; each rank measures its part of the images.

        Args:
            begin: called with the name of each attack before it is measured.

        Raises:
            Stopped: `should_stop` returned True, here or on another rank.
        """
        accuracies = {}
        for name in ATTACKS:
            begin(name)
            accuracies[f"val_{name}_acc"] = self._accuracy(name, should_stop)
        return accuracies

    def _accuracy(self, name: str, should_stop: Callable[[], bool]) -> float:
        """The share of the images that the network classifies correctly under the attack `name`."""
        here = world()
        if here.alone:
            return self._measured(name, should_stop, slice(None)).accuracy
        rows = slice(here.rank, None, here.size) if len(self.images) >= here.size else slice(None)
        found: Measurement | None = None
        with suppress(Stopped):
            found = self._measured(name, should_stop, rows)
        told = here.gather(None if found is None else (found.correct, found.images))
        parts = [counts for counts in told if counts is not None]
        if len(parts) < here.size:
            raise Stopped
        return sum(correct for correct, _ in parts) / sum(images for _, images in parts)

    def _measured(self, name: str, should_stop: Callable[[], bool], rows: slice) -> Measurement:
        config = self._config
        norm, eps = config.attack.norm, config.attack.eval_eps
        with apart():
            return measure(
                self._networks.deployed(),
                self.images.part(rows),
                parse_attack(name, eps=eps, step_size=usual_step(norm, eps), norm=norm),
                device=torch.device(config.engine.device),
                batch_size=config.data.eval_batch_size,
                seed=config.engine.seed,
                channels_last=config.engine.channels_last == "on",
                winograd=config.engine.winograd != "off",
                kept=self._replica,
                should_stop=should_stop,
                numbers=torch.arange(len(self.images))[rows],
            )

    def chance(self) -> float:
        """The accuracy of always naming the most frequent class."""
        return int(torch.bincount(self.images.labels).max()) / len(self.images)

    def sees_initial_weights(self) -> bool:
        """True if the deployed network is an average that is still mostly its first weights."""
        ema = self._networks.ema
        return ema is not None and first_share(ema.decay, warmup=ema.warmup, updates=ema.updates) > MOSTLY
