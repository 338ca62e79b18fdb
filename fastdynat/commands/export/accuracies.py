"""The accuracies that a run's stored evaluations give to one checkpoint."""

from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Any

from fastdynat.commands.evaluate.measurement_store import read_measurements
from fastdynat.evaluation import Measurement
from fastdynat.runs import code_version

REFERENCE = "autoattack"
ROBUST = (REFERENCE, "fast-autoattack")
PARTIAL = ("shard", "standing", "source")  # keys of parts of a measurement, and of transfer attacks


@dataclass(frozen=True)
class Accuracies:
    """Shares in [0, 1] of the same `images` test images, None where nothing is stored.

    Attributes:
        attack: the implementation of AutoAttack, "autoattack" (its authors') or "fast-autoattack".
        note: what they are, or what to run.
    """

    clean: float | None
    autoattack: float | None
    images: int | None
    attack: str | None
    note: str


@dataclass(frozen=True)
class _Found:
    """A stored measurement that counts; current: of the present version of the code."""

    attack: str
    measured: Measurement
    current: bool

    @property
    def merit(self) -> tuple[bool, bool, float]:
        """The reference AutoAttack goes before ours, then present code, then what found more."""
        return self.attack == REFERENCE, self.current, -self.measured.accuracy


def stored_accuracies(run: Path, weights: str, *, dataset: str, norm: str, eps: float) -> Accuracies:
    """Clean and AutoAttack accuracy of the checkpoint whose weights have the sha256 `weights`, at `eps` in
    `norm` on `dataset`.

    Only float32 counts. Both are of the same images: of the largest set that both were measured on, or if
    there is none, of the largest that has an AutoAttack accuracy, or a clean one.
    """
    sets: dict[tuple[object, int], list[_Found]] = {}
    for key, about, measured in read_measurements(run):
        if _counts(key, about, weights=weights, dataset=dataset, norm=norm, eps=eps):
            found = _Found(key["attack"], measured, key.get("version") == code_version())
            sets.setdefault((key.get("images"), measured.images), []).append(found)
    chosen = [(images, _best(found, ("clean",)), _best(found, ROBUST)) for (_, images), found in sets.items()]
    chosen = [one for one in chosen if one[1] or one[2]]
    images, clean, robust = max(chosen, key=_merit_of_set, default=(None, None, None))
    note = [
        f"{one.attack}: {100 * one.measured.accuracy:.2f} % of {images} images"
        for one in (clean, robust)
        if one is not None
    ]
    if len(chosen) > 1:
        note.append(f"results on {len(chosen) - 1} other sets of images are left out")
    if clean is None or robust is None:
        note.append(f"the rest is null until: fastdynat eval {run} --attacks clean,fast-autoattack")
    clean_share, robust_share = (None if one is None else one.measured.accuracy for one in (clean, robust))
    attack = None if robust is None else robust.attack
    return Accuracies(clean_share, robust_share, images, attack, "; ".join(note))


def _counts(
    key: dict[str, Any], about: dict[str, Any], *, weights: str, dataset: str, norm: str, eps: float
) -> bool:
    """True for a whole measurement of these weights, in float32, under this threat model."""
    if not {"norm", "eps", "dataset"} <= about.keys() or about["dataset"] != dataset:
        return False
    if key.get("weights") != weights or key.get("amp") != "off":
        return False
    if any(key.get(part) is not None for part in PARTIAL):
        return False
    same_threat = about["norm"] == norm and isclose(about["eps"], eps, rel_tol=1e-6)
    return key["attack"] == "clean" or same_threat


def _best(found: list[_Found], attacks: tuple[str, ...]) -> _Found | None:
    return max((one for one in found if one.attack in attacks), key=lambda one: one.merit, default=None)


def _merit_of_set(one: tuple[int, _Found | None, _Found | None]) -> tuple[Any, ...]:
    images, clean, robust = one
    merits = [(False, False, 0.0) if found is None else found.merit for found in (robust, clean)]
    return clean is not None and robust is not None, robust is not None, images, *merits
