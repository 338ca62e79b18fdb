"""Validation of a run: accuracy of the deployed network, clean and under PGD-10 at the evaluation radius."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdynat.attack_engine.steps import usual_step
from fastdynat.attacks import NamedAttack, parse_attack
from fastdynat.data import Images
from fastdynat.evaluation import KeptReplica, Measurement, measure
from fastdynat.evaluation.measure_on_ranks import measure_on_ranks
from fastdynat.evaluation.outcome import unpack_bits
from fastdynat.training.average_share import MOSTLY, averaging, first_share
from fastdynat.training.networks import NetworkSet
from fastdynat.training.resolved_config import ResolvedConfig

PGD = "pgd10"


class Validation:
    """Measures the deployed network on the validation `images`; keeps the attacked replica between calls."""

    def __init__(self, config: ResolvedConfig[Any], networks: NetworkSet, images: Images) -> None:
        self.images = images
        self._config, self._networks, self._replica = config, networks, KeptReplica()

    def accuracies(self, begin: Callable[[str], None], should_stop: Callable[[], bool]) -> dict[str, float]:
        """val_clean_acc and val_pgd10_acc, as shares; several processes share the images.

        Of a run with several norms, val_pgd10_acc counts the images that stay correct under all of them, and
        val_pgd10_acc_NORM those under one.

        Args:
            begin: called with the name of each attack before it is measured.

        Raises:
            Stopped: `should_stop` returned True, here or on another rank.
        """
        config, accuracies = self._config, {}
        radii = config.attack.eval_radii()
        standing = torch.ones(len(self.images), dtype=torch.bool)
        for name, norm in [("clean", config.attack.norm), *((PGD, norm) for norm in radii)]:
            own = f"val_{name}_acc"
            begin(name if name == "clean" or len(radii) == 1 else f"{name} {norm}")
            eps = radii[norm]
            attack = parse_attack(name, eps=eps, step_size=usual_step(norm, eps), norm=norm)
            found = measure_on_ranks(
                partial(self._measured, attack, should_stop),
                attack,
                self.images.labels,
                batch_size=config.data.eval_batch_size,
            )
            if name == "clean" or len(radii) == 1:
                accuracies[own] = found.accuracy
                continue
            standing &= unpack_bits(found.robust_bits, found.images)
            accuracies[own] = int(standing.sum()) / len(standing)
            accuracies[f"{own}_{norm}"] = found.accuracy
        return accuracies

    def _measured(
        self, attack: NamedAttack, should_stop: Callable[[], bool], own: Tensor | None, batch_size: int
    ) -> Measurement:
        """The measurement of the images `own`, (N,) bool, by this process; None is all."""
        config = self._config
        return measure(
            self._networks.deployed(),
            self.images,
            attack,
            device=torch.device(config.engine.device),
            batch_size=batch_size,
            seed=config.engine.seed,
            channels_last=config.engine.channels_last == "on",
            winograd=config.engine.winograd != "off",
            standing=own,
            kept=self._replica,
            should_stop=should_stop,
        )

    def chance(self) -> float:
        """The accuracy of always naming the most frequent class."""
        return int(torch.bincount(self.images.labels).max()) / len(self.images)

    def sees_initial_weights(self) -> bool:
        """True if the deployed network is an average that is still mostly its first weights.

        Before averaging begins it is a copy of the present weights.
        """
        ema = self._networks.ema
        return (
            ema is not None
            and averaging(ema.rule, ema.updates)
            and first_share(ema.rule, ema.updates) > MOSTLY
        )
