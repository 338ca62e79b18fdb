"""Statistics of the study: paired differences over seeds and images, Holm's correction, calibration."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A mean difference, in points (percent).

    Attributes:
        mean: over seeds and images.
        ci: 95 % interval of the bootstrap over seeds and images.
        p: two-sided, of no difference.
        seeds: mean of each seed.
    """

    mean: float
    ci: tuple[float, float]
    p: float
    seeds: tuple[float, ...]

    @property
    def same_sign(self) -> bool:
        """True if all seeds agree with the mean in sign."""
        return all(seed * self.mean > 0 for seed in self.seeds)


def paired(differences: Array, *, draws: int = 10_000, seed: int = 1) -> Estimate:
    """Bootstrap of a paired difference, seeds crossed with images.

    Each draw takes seeds and images with replacement; all seeds share the draw of images, because the test
    images are the same. Few seeds make the spread between draws of seeds too small by (S - 1) / S in
    variance; their deviations from the mean are therefore widened by the square root of S / (S - 1).

    differences: (S, N) of each seed and image, such as +1, 0, -1; S >= 2.
    """
    seeds, images = differences.shape
    if seeds < 2:
        raise ValueError(f"a bootstrap over seeds needs at least 2 of them, got {seeds}")
    generator = np.random.default_rng(seed)
    means = 100.0 * differences.mean(1)
    own = sqrt(seeds / (seeds - 1)) * (means - means.mean())
    # An image counts by its column only, and there are few different columns: draws of their numbers are
    # draws of images.
    columns, counts = np.unique(differences, axis=1, return_counts=True)
    drawn = generator.multinomial(images, counts / images, draws) / images
    centre = 100.0 * drawn @ columns.mean(0)
    found = centre + own[generator.integers(0, seeds, (draws, seeds))].mean(1)
    low, high = np.quantile(found, (0.025, 0.975))
    tail = min((found <= 0).mean(), (found >= 0).mean())
    p = min(1.0, 2 * max(tail, 1 / draws))
    return Estimate(float(means.mean()), (float(low), float(high)), float(p), tuple(map(float, means)))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values (1979): the smallest times m, the next times m - 1, ..., never falling."""
    adjusted, largest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = largest
    return adjusted


def calibration_error(probs: Array, labels: Array, *, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017) of the arg-max: mean |accuracy - confidence|, in [0, 1].

    probs: (N, K), rows sum to 1. labels: (N,) int. Bins of equal width over (0, 1], weighted by their images.
    """
    confidence, right = probs.max(1), probs.argmax(1) == labels
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    error = 0.0
    for number in range(bins):
        inside = place == number
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return float(error)


def entropy(probs: Array) -> float:
    """Mean entropy of the rows of `probs`, (N, K), in nats."""
    return float(-(probs * np.log(np.clip(probs, 1e-30, None))).sum(1).mean())
