"""Signs of masked gradients, which make a robust accuracy untrustworthy.

The signs are those of Athalye et al. 2018 (arXiv 1802.00420, section 3.1) and Carlini et al. 2019 (arXiv
1902.06705). A soundly trained robust network shows none of them; a network that shows one may still be
robust, but these numbers do not prove it.

Two attacks are compared image by image. A difference counts only if it exceeds that of sound networks (the
constants below) by more than the choice of images explains: `at_least` is its lower 99 % bound, so that one
of a hundred sound networks at the usual limit would be suspected; most are far below it."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from math import isnan, prod, sqrt

import torch
from torch import nn

from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attack_engine.steps import usual_step
from fastdynat.attacks import NamedAttack, RestartedPGD, parse_attack
from fastdynat.data import Images
from fastdynat.errors import UserError
from fastdynat.evaluation.measure import exact_float32
from fastdynat.evaluation.outcome import Measurement, wilson
from fastdynat.evaluation.probes import ProbedNetwork, RobustImages
from fastdynat.models import Divide

Z99 = 2.3263478740408408  # the standard normal's 99 % quantile
# Shares of images in sound networks. On small CIFAR-10 networks trained by Madry's method and LBGAT, on 2,000
# images, the first four were 0, 0.001, 0.027 and 0 (net of images broken by the other attack only).
USUAL_FGSM = 0.01  # broken by FGSM, not by PGD-20: cross-entropy is not the margin
USUAL_STEPS = 0.01  # broken by PGD-50 with two starts, not by PGD-20
USUAL_LOSS = 0.04  # broken by PGD on the margin, not on the cross-entropy
USUAL_BLACK_BOX = 0.01  # broken by a black-box attack, by no white-box one
UNBOUNDED = 0.01  # robust in a ball that holds a grey image, the same one for all classes
NO_GRADIENT = 0.01  # correct but without a gradient, so not attacked at all
WHITE_BOX = ("fgsm", "pgd20", "cw20", "pgd50-2")
# Largest change of logits between passes, relative to the largest: AutoAttack's limit; rounding is below
# 1e-5.
RANDOM = 1e-4
BLACK_BOX = "square1000"


@dataclass(frozen=True, kw_only=True)
class MaskingCheck:
    """Result of the check for one sign of masking.

    Attributes:
        name: of the check.
        passed: the sign is absent.
        evidence: the numbers, in words.
        remedy: the next step, as a command where there is one; "" if passed.
    """

    name: str
    passed: bool
    evidence: str
    remedy: str


@dataclass(frozen=True, kw_only=True)
class MaskingReport:
    """All checks with their measurements."""

    checks: list[MaskingCheck]
    measurements: list[Measurement]

    @property
    def warnings(self) -> list[MaskingCheck]:
        """The checks that failed."""
        return [check for check in self.checks if not check.passed]


def at_least(more: int, less: int, images: int) -> float:
    """Lower 99 % bound of the difference of two paired shares.

    Of the same images, `more` count for the first share only and `less` for the second only. Agresti & Min
    2005 (Statistics in Medicine 24:729): half an image is added to each of four cells.
    """
    more_, less_, total = more + 0.5, less + 0.5, images + 2
    difference = (more_ - less_) / total
    return difference - Z99 * sqrt(max(0.0, (more_ + less_) / total - difference**2) / total)


@exact_float32()
def check_masking(
    model: nn.Module,
    images: Images,
    *,
    norm: str,
    eps: float,
    device: torch.device,
    batch_size: int,
    seed: int,
    source: nn.Module | None = None,
    on_ranks: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    advance: Callable[[float], None] = lambda images: None,
) -> MaskingReport:
    """Attack `model` by attacks whose order of strength is known without masking, and report violations.

    Args:
        model: images in [0, 1] -> logits, on `device`.
        images: two hundred show gross masking; differences of a few points need thousands.
        norm: linf, l2 or l1.
        eps: radius of the ball of the claimed robust accuracy.
        batch_size: images per batch; halved where memory runs out.
        source: another network on `device`, for a transfer attack among the black-box attacks.
        on_ranks: deal the images out to the processes of the world, all of which must call this alike.
        advance: as in `measure`; its total is ``len(images)``.

    Raises:
        UserError: an unknown norm, or an invalid radius.
        Stopped: `should_stop` returned True.
    """
    grey = radius_of_grey(norm, images)
    step_size = usual_step(norm, eps)
    fgsm, pgd, margin, longer = (
        parse_attack(name, eps=eps, step_size=step_size, norm=norm) for name in WHITE_BOX
    )
    boxes = _black_boxes(norm, eps, source, pgd)
    probed = ProbedNetwork(model, images, device, batch_size, seed, should_stop, advance, on_ranks)
    # The label's logit then leads by at most 1 for half of the images, far from the softmax's saturation.
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


def radius_of_grey(norm: str, images: Images) -> float:
    """Radius at which the ball around any image contains the grey image.

    Raises:
        UserError: a norm without masking checks.
    """
    pixels = prod(images.shape)
    radii = {"linf": 0.5, "l2": 0.5 * sqrt(pixels), "l1": 0.5 * pixels}
    if norm not in radii:
        raise UserError(f"the masking checks support {', '.join(radii)}, not {norm}: leave --checks out")
    return radii[norm]


def _black_boxes(
    norm: str, eps: float, source: nn.Module | None, pgd: NamedAttack
) -> list[tuple[NamedAttack, nn.Module | None]]:
    """Attacks that do not use the network's gradient, each with the network that it uses instead."""
    boxes: list[tuple[NamedAttack, nn.Module | None]] = []
    with suppress(UserError):  # not for every norm
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
    return probed.run(attack, source=nn.Sequential(probed.model, Divide(scale)))


def _repeats(instability: float) -> MaskingCheck:
    if isnan(instability):
        remedy = "look for a division by zero or an overflow in the network"
        return _check(
            "repeated answers",
            False,
            "logits are NaN or infinite, so no attack or accuracy means anything",
            remedy,
        )
    evidence = (
        f"logits of equal images differ by up to {instability:.2g} of the largest, "
        f"rounding by less than {RANDOM:g}"
    )
    remedy = "switch the randomness off, or attack its mean: AutoAttack's version 'rand' averages 20 draws"
    return _check("repeated answers", instability <= RANDOM, evidence, remedy)


def _has_gradients(probed: ProbedNetwork, norm: str, eps: float) -> MaskingCheck:
    silent, correct = probed.without_gradient(norm, eps)
    shares = {goal: count / max(correct, 1) for goal, count in silent.items()}
    parts = ", ".join(f"{goal} {100 * share:.1f} %" for goal, share in shares.items())
    evidence = (
        f"share of {correct} correctly classified images without any gradient: {parts}; "
        f"more than {100 * NO_GRADIENT:g} % is suspicious"
    )
    if shares["margin"] > NO_GRADIENT:
        remedy = (
            "fastdynat eval RUN --attacks square; "
            "then replace the operation without a gradient by a smooth one (BPDA)"
        )
    else:
        remedy = "fastdynat eval RUN --attacks cw50-10,apgd-t,square"
    return _check("gradients", max(shares.values()) <= NO_GRADIENT, evidence, remedy)


def _unbounded(far: RobustImages) -> MaskingCheck:
    share = float(far.robust.float().mean())
    evidence = (
        f"{_share(far)}, although its ball holds a grey image; "
        f"a sound attack leaves at most {100 * UNBOUNDED:g} %"
    )
    return _check(
        "unbounded attack", share <= UNBOUNDED, evidence, "fastdynat eval RUN --attacks cw50-10,apgd-t,square"
    )


def _compare(name: str, base: RobustImages, rival: RobustImages, usual: float, attacks: str) -> MaskingCheck:
    """A check that fails if `rival` breaks more images than `base`, beyond `usual` and chance."""
    more, less = (int((a.robust & ~b.robust).sum()) for a, b in ((base, rival), (rival, base)))
    images = len(base.robust)
    lowest = at_least(more, less, images)
    evidence = (
        f"{_share(base)}, {_share(rival)}; {more} of {images} images fall to the second only, "
        f"{less} to the first only: {100 * (more - less) / images:+.1f} points, "
        f"with 99 % confidence {100 * lowest:+.1f} or more; up to {100 * usual:+.0f} is usual"
    )
    return _check(name, lowest <= usual, evidence, f"fastdynat eval RUN --attacks {attacks}")


def _check(name: str, passed: bool, evidence: str, remedy: str) -> MaskingCheck:
    return MaskingCheck(name=name, passed=passed, evidence=evidence, remedy="" if passed else remedy)


def _share(verdict: RobustImages) -> str:
    correct, images = int(verdict.robust.sum()), len(verdict.robust)
    low, high = wilson(correct, images)
    return f"{verdict.attack} leaves {100 * correct / images:.1f} % ({100 * low:.1f} to {100 * high:.1f} %)"
