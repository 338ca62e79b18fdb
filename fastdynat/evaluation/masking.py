"""Signs that a robust accuracy is not one: gradients that are masked, not absent.

The signs are those of Athalye et al. 2018 (arXiv 1802.00420, section 3.1) and Carlini et al. 2019 (arXiv
1902.06705). A robust network trained as it should be shows none of them; a network that shows one may still
be robust, but not by these numbers.

Two attacks are compared image by image. A difference counts only where it exceeds what sound networks show
(the constants below say how much) by more than the choice of the images explains: `at_least` is its lower 99 % bound, so
that of a hundred sound networks, each at the edge of what is usual, one would be suspected; most are far from
the edge.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from math import isnan, sqrt

import torch
from torch import nn

from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attack_engine.steps import usual_step
from fastdynat.attacks import NamedAttack, RestartedPGD, parse_attack
from fastdynat.data import ImageSet
from fastdynat.errors import UserError
from fastdynat.evaluation.measure import exact_float32
from fastdynat.evaluation.outcome import Measurement, wilson
from fastdynat.evaluation.probes import ProbedNetwork, RobustImages, ScaledLogits

Z99 = 2.3263478740408408  # the standard normal's 99 % quantile
# What sound networks show, as shares of the images. On small CIFAR-10 networks trained by Madry's method and
# LBGAT, on 2,000 images, it was 0, 0.001, 0.027 and 0 (net of images that fall to the other attack only).
USUAL_FGSM = (
    0.01  # fall to FGSM, not to PGD-20: the largest cross-entropy need not be the largest of a wrong class
)
USUAL_STEPS = 0.01  # fall to PGD-50 with two starts, not to PGD-20
USUAL_LOSS = 0.04  # fall to PGD on the margin, not on the cross-entropy
USUAL_BLACK_BOX = 0.01  # fall to a black-box attack, to no white-box one
UNBOUNDED = 0.01  # stand in a ball that holds a grey image, the same one for all classes
NO_GRADIENT = (
    0.01  # have no gradient although the network is right: images that the attack does not attack at all
)
WHITE_BOX = ("fgsm", "pgd20", "cw20", "pgd50-2")
RANDOM = 1e-4  # of the largest logit, between passes over the same images: AutoAttack's own limit; rounding is below 1e-5
BLACK_BOX = "square1000"


@dataclass(frozen=True, kw_only=True)
class MaskingCheck:
    """One sign of masking that was looked for.

    Attributes:
        name: of the check.
        passed: the sign is not there.
        evidence: the numbers, in words.
        remedy: what to run next, as a command where there is one; "" if passed.
    """

    name: str
    passed: bool
    evidence: str
    remedy: str


@dataclass(frozen=True, kw_only=True)
class MaskingReport:
    """All checks, and the measurements that they rest on."""

    checks: list[MaskingCheck]
    measurements: list[Measurement]

    @property
    def warnings(self) -> list[MaskingCheck]:
        """The checks that failed."""
        return [check for check in self.checks if not check.passed]


def at_least(more: int, less: int, images: int) -> float:
    """The lower 99 % bound of a difference of two shares of the same images, of which `more` count for the
    first only and `less` for the second only (Agresti & Min 2005, Statistics in Medicine 24:729: half an
    image added to each of four cells).
    """
    more_, less_, total = more + 0.5, less + 0.5, images + 2
    difference = (more_ - less_) / total
    return difference - Z99 * sqrt(max(0.0, (more_ + less_) / total - difference**2) / total)


@exact_float32()
def check_masking(
    model: nn.Module,
    images: ImageSet,
    *,
    norm: str,
    eps: float,
    device: torch.device,
    batch_size: int,
    seed: int,
    source: nn.Module | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    advance: Callable[[float], None] = lambda images: None,
) -> MaskingReport:
    """Attack `model` in ways whose order is known for a network that masks nothing, and say where it is
    another.

    Args:
        model: images in [0, 1] -> logits, on `device`.
        images: two hundred show what is grossly wrong; differences of a few points need thousands.
        norm: linf, l2 or l1.
        eps: radius of the ball, of which the robust accuracy is claimed.
        source: another network on `device`, whose adversarial images are one of the black-box attacks.
        advance: as in `measure`; in all it is told ``len(images)``.

    Raises:
        UserError: an unknown norm, or no radius of it.
        Stopped: `should_stop` said so.
    """
    grey = radius_of_grey(norm, images)
    step_size = usual_step(norm, eps)
    fgsm, pgd, margin, longer = (
        parse_attack(name, eps=eps, step_size=step_size, norm=norm) for name in WHITE_BOX
    )
    boxes = _black_boxes(norm, eps, source, pgd)
    probed = ProbedNetwork(model, images, device, batch_size, seed, should_stop, advance)
    # The label's logit then leads by at most 1 in half of the images: far from where the softmax saturates.
    scale = max(1.0, probed.median_lead())
    probed.runs = 5 + (scale > 1) + len(boxes)
    checks = [_repeats(probed.instability()), _has_gradients(probed, norm, eps)]

    base = probed.run(pgd)
    rivals = [
        ("iterations", probed.run(fgsm), USUAL_FGSM, "apgd-ce,apgd-t,square"),
        ("convergence", probed.run(longer, standing=base.robust), USUAL_STEPS, "pgd100-10,apgd-ce,apgd-t"),
        ("loss", probed.run(margin), USUAL_LOSS, "cw50-10,apgd-t"),
        ("scale of the logits", _on_small_logits(probed, pgd, base, scale), USUAL_LOSS, "cw50-10,apgd-t"),
    ]
    checks += [_compare(name, base, rival, usual, attacks) for name, rival, usual, attacks in rivals]

    spec = PGDSpec(grey, grey / 10, 50, norm=norm)
    checks.append(_unbounded(probed.run(NamedAttack(f"pgd50 at eps {grey:.3g}", RestartedPGD("ce", spec)))))

    white = RobustImages(
        "every white-box attack", torch.stack([v.robust for v in (base, *(r[1] for r in rivals))]).all(0)
    )
    for box, maker in boxes:
        found = probed.run(box, source=maker, standing=white.robust)
        checks.append(_compare("black box", white, found, USUAL_BLACK_BOX, "apgd-t,square"))
    return MaskingReport(checks=checks, measurements=probed.measurements)


def radius_of_grey(norm: str, images: ImageSet) -> float:
    """The radius of a ball around any image that holds the grey one.

    Raises:
        UserError: a norm that the checks do not know.
    """
    pixels = images.images[0].numel()
    radii = {"linf": 0.5, "l2": 0.5 * sqrt(pixels), "l1": 0.5 * pixels}
    if norm not in radii:
        raise UserError(f"the masking checks know {', '.join(radii)}, not {norm}: leave --checks out")
    return radii[norm]


def _black_boxes(
    norm: str, eps: float, source: nn.Module | None, pgd: NamedAttack
) -> list[tuple[NamedAttack, nn.Module | None]]:
    """Attacks that use no gradient of the network, with the network that they use instead."""
    boxes: list[tuple[NamedAttack, nn.Module | None]] = []
    with suppress(UserError):  # not in every norm
        boxes.append((parse_attack(BLACK_BOX, eps=eps, step_size=usual_step(norm, eps), norm=norm), None))
    if source is not None:
        boxes.append((NamedAttack(f"{pgd.name} on another network", pgd.search), source))
    return boxes


def _on_small_logits(
    probed: ProbedNetwork, pgd: NamedAttack, base: RobustImages, scale: float
) -> RobustImages:
    attack = NamedAttack(f"{pgd.name} on logits / {scale:.3g}", pgd.search)
    if scale == 1:
        return replace(base, attack=attack.name)
    return probed.run(attack, source=ScaledLogits(probed.model, scale))


def _repeats(instability: float) -> MaskingCheck:
    if isnan(instability):
        remedy = "look for a division by zero or an overflow in the network: what it computes is no number"
        return _check(
            "repeated answers",
            False,
            "logits are NaN or infinite, which no attack or accuracy can rest on",
            remedy,
        )
    evidence = f"logits of equal images differ by up to {instability:.2g} of the largest, rounding by less than {RANDOM:g}"
    remedy = "switch the randomness off, or attack its mean: AutoAttack's version 'rand' averages 20 draws"
    return _check("repeated answers", instability <= RANDOM, evidence, remedy)


def _has_gradients(probed: ProbedNetwork, norm: str, eps: float) -> MaskingCheck:
    silent, correct = probed.without_gradient(norm, eps)
    shares = {goal: count / max(correct, 1) for goal, count in silent.items()}
    parts = ", ".join(f"{goal} {100 * share:.1f} %" for goal, share in shares.items())
    evidence = f"share of {correct} correctly classified images without any gradient: {parts}; {100 * NO_GRADIENT:g} % is much"
    if shares["margin"] > NO_GRADIENT:
        remedy = "fastdynat eval RUN --attacks square; then replace what has no gradient by a smooth function (BPDA)"
    else:
        remedy = "fastdynat eval RUN --attacks cw50-10,apgd-t,square"
    return _check("gradients", max(shares.values()) <= NO_GRADIENT, evidence, remedy)


def _unbounded(far: RobustImages) -> MaskingCheck:
    share = float(far.robust.float().mean())
    evidence = f"{_share(far)}, although its ball holds a grey image; a sound attack leaves at most {100 * UNBOUNDED:g} %"
    return _check(
        "unbounded attack", share <= UNBOUNDED, evidence, "fastdynat eval RUN --attacks cw50-10,apgd-t,square"
    )


def _compare(name: str, base: RobustImages, rival: RobustImages, usual: float, attacks: str) -> MaskingCheck:
    """Fails where `rival` breaks more images than `base`, by more than `usual` and chance."""
    more, less = (int((a.robust & ~b.robust).sum()) for a, b in ((base, rival), (rival, base)))
    images = len(base.robust)
    lowest = at_least(more, less, images)
    evidence = (
        f"{_share(base)}, {_share(rival)}; {more} of {images} images fall to the second only, {less} to the first only: "
        f"{100 * (more - less) / images:+.1f} points, with 99 % confidence {100 * lowest:+.1f} or more; usual are "
        f"up to {100 * usual:+.0f}"
    )
    return _check(name, lowest <= usual, evidence, f"fastdynat eval RUN --attacks {attacks}")


def _check(name: str, passed: bool, evidence: str, remedy: str) -> MaskingCheck:
    return MaskingCheck(name=name, passed=passed, evidence=evidence, remedy="" if passed else remedy)


def _share(verdict: RobustImages) -> str:
    correct, images = int(verdict.robust.sum()), len(verdict.robust)
    low, high = wilson(correct, images)
    return f"{verdict.attack} leaves {100 * correct / images:.1f} % ({100 * low:.1f} to {100 * high:.1f} %)"
