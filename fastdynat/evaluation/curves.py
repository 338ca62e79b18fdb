"""Accuracy over the radius: from the distances of one attack, or from one attack per radius."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fastdynat.attack_engine.steps import usual_step
from fastdynat.attacks import NamedAttack, parse_attack
from fastdynat.data import Images
from fastdynat.documents.numbers import Radius, Share
from fastdynat.errors import UserError
from fastdynat.evaluation.measure import measure
from fastdynat.evaluation.outcome import Measurement, unpack_bits, wilson


@dataclass(frozen=True, kw_only=True)
class EpsCurve:
    """Accuracy over the radius of the ball; plain JSON values.

    Attributes:
        norm: linf, l2, l1 or l0.
        attack: its name.
        eps: radii in [0, 1] pixel units, in the order of the result.
        accuracy: at each radius, in [0, 1].
        ci: the 95 % interval (`wilson`) of each.
    """

    norm: str
    attack: str
    eps: list[Radius]
    accuracy: list[Share]
    ci: list[tuple[Share, Share]]

    @classmethod
    def of(cls, norm: str, attack: str, correct: dict[float, int], images: int) -> "EpsCurve":
        """From the number of correct images at each radius."""
        counts = correct.values()
        return cls(
            norm=norm,
            attack=attack,
            eps=list(correct),
            accuracy=[count / images for count in counts],
            ci=[wilson(count, images) for count in counts],
        )


def curve_of_distances(measurement: Measurement, norm: str, eps: Sequence[float]) -> EpsCurve:
    """The share of images whose nearest adversarial image lies beyond each radius.

    Args:
        measurement: of a minimum-norm attack. An image without an adversarial one is correct at every radius;
            a misclassified clean image at none, not even at 0.
        norm: of the distances.
        eps: radii >= 0.

    Raises:
        UserError: the attack gives no distances, or a radius is negative.
    """
    distances = distances_of(measurement)
    radii = _radii(eps)
    correct = {e: sum(d is None or d > e for d in distances) for e in radii}
    return EpsCurve.of(norm, measurement.attack, correct, len(distances))


def distances_of(measurement: Measurement) -> list[float | None]:
    """The measurement's distances; UserError if its attack gives none."""
    if measurement.distances is None:
        raise UserError(
            f"{measurement.attack} stays in one ball and gives no distances; use an attack such as deepfool"
        )
    return measurement.distances


def accuracy_over_eps(
    model: nn.Module,
    images: Images,
    attack: str,
    eps: Sequence[float],
    *,
    norm: str = "linf",
    device: torch.device,
    batch_size: int,
    seed: int,
    should_stop: Callable[[], bool] = lambda: False,
    advance: Callable[[float], None] = lambda images: None,
) -> EpsCurve:
    """Run `attack` at every radius, smallest first, with the steps that go with it (`usual_step`).

    An image broken at one radius is not attacked at larger ones, whose balls contain its adversarial image;
    so the curve never rises. Radius 0 is clean accuracy.

    Args:
        attack: a name of `parse_attack`.
        eps: radii >= 0 in [0, 1] pixel units; under "l0" whole numbers of pixels.
        advance: as in `measure`; its total is ``len(images)`` for each radius.

    Raises:
        UserError: a radius is negative; the attack is unknown or does not depend on the radius.
        Stopped: `should_stop` returned True.
    """
    radii = _radii(eps)
    attacks = {e: _at(attack, e, norm) for e in sorted(radii)}
    standing = torch.ones(len(images), dtype=torch.bool)
    correct: dict[float, int] = {}
    for e, named in attacks.items():
        advance(len(images) - int(standing.sum()))
        found = measure(
            model,
            images,
            named,
            device=device,
            batch_size=batch_size,
            seed=seed,
            standing=standing,
            should_stop=should_stop,
            advance=advance,
        )
        standing, correct[e] = unpack_bits(found.robust_bits, len(images)), found.correct
    return EpsCurve.of(norm, attack, {e: correct[e] for e in radii}, len(images))


def _radii(eps: Sequence[float]) -> list[float]:
    radii = list(dict.fromkeys(float(e) for e in eps))
    if not radii or min(radii) < 0:
        raise UserError(f"radii of a curve must be >= 0 and at least one, got {list(eps)}")
    return radii


def _at(attack: str, eps: float, norm: str) -> NamedAttack:
    if eps == 0:
        return NamedAttack("clean")
    # A second radius shows whether the attack depends on it; under L0 it is a whole number.
    other = eps + 1 if norm == "l0" else eps / 2
    here, there = (
        parse_attack(attack, eps=e, step_size=usual_step(norm, e), norm=norm) for e in (eps, other)
    )
    if here == there:
        raise UserError(
            f"{attack} does not depend on the radius; its curve comes from its distances (curve_of_distances)"
        )
    return here
