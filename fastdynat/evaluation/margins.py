"""Margins: the distances to the nearest adversarial images that an attack found."""

from dataclasses import dataclass
from math import inf, isfinite
from statistics import median

import numpy as np

from fastdynat.errors import UserError
from fastdynat.evaluation.curves import distances_of
from fastdynat.evaluation.outcome import Measurement


@dataclass(frozen=True, kw_only=True)
class Margins:
    """The distances of a minimum-norm attack: upper bounds of the true margins.

    Attributes:
        norm: of the distances.
        attack: its name.
        median: over all images; a misclassified clean image has distance 0, one without an adversarial image
            an infinite one. None if the median is infinite.
        found: share of images with a distance, in [0, 1].
        edges: of the histogram's bins, from 0 to the largest distance; one more than bins.
        counts: images per bin; misclassified clean images are in the first bin, images without a distance in
            none.
    """

    norm: str
    attack: str
    median: float | None
    found: float
    edges: list[float]
    counts: list[int]


def margins(measurement: Measurement, norm: str, *, bins: int = 30) -> Margins:
    """The median and the histogram of the distances of `measurement`.

    Raises:
        UserError: the attack gives no distances, or `bins` is below 1.
    """
    if bins < 1:
        raise UserError(f"a histogram needs at least one bin, got {bins}")
    distances = distances_of(measurement)
    known = [d for d in distances if d is not None]
    counts, edges = np.histogram(known, bins=bins, range=(0, max(known, default=0) or 1))
    middle = median(inf if d is None else d for d in distances)
    return Margins(
        norm=norm,
        attack=measurement.attack,
        median=middle if isfinite(middle) else None,
        found=len(known) / len(distances),
        edges=edges.tolist(),
        counts=counts.tolist(),
    )
