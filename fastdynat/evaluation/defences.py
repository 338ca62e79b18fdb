"""Warnings of an unreliable AutoAttack evaluation, each with a remedy."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastdynat.attack_engine.goal import wide
from fastdynat.attack_engine.zero_gradients import zero_gradient_message
from fastdynat.caller_warnings import warn_caller
from fastdynat.errors import UserError
from fastdynat.evaluation.measure import model_logits
from fastdynat.models.logits import NO_CLASS

MOVES = 1e-4  # most change of normalised logits between passes of a deterministic network
NEAR_ONE = 1e-5
SQUARE_GAIN = 0.002


def check_answers(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, *, randomised: bool) -> int:
    """Warn of a randomised network, unless `randomised`, or of probabilities; returns the number of classes.

    x: (n, C, H, W), one batch is enough.
    """
    with torch.no_grad():
        passes = [wide(model_logits(model, x)) for _ in range(1 if randomised else 5)]
    units = torch.stack([a / (a.norm(dim=1, keepdim=True) + 1e-10) for a in passes])
    moved = (units[:, None] - units[None]).norm(dim=-1).amax()
    correct = {int((a.argmax(1) == y).sum()) for a in passes}
    if len(correct) > 1 or float(moved) > MOVES:
        warn("the network is randomised: equal images get different logits; use version='rand'")
    first = passes[0]
    if (
        first.min() > -NEAR_ONE
        and first.max() < 1 + NEAR_ONE
        and bool(((first.sum(1) - 1).abs() < NEAR_ONE).all())
    ):
        warn("the network's outputs look like probabilities: attacks need logits; leave its softmax out")
    return first.shape[1]


def check_gradients(name: str, zero: int, gradients: int) -> None:
    """Warn of images whose gradient is zero."""
    if zero:
        warn(f"{name}: {zero_gradient_message(zero, gradients)}")


def check_classified(classes: Tensor, which: str) -> None:
    """Refuse NaN or infinite logits, which would count as misclassifications."""
    lost = int((classes == NO_CLASS).sum())
    if lost:
        raise UserError(
            f"the network's logits are NaN or infinite for {lost} of {len(classes)} {which}, which cannot be "
            "judged; check its weights, and its precision for an overflow"
        )


def check_square(accuracies: Mapping[str, float]) -> None:
    """Warn if Square breaks images that gradient attacks do not.

    accuracies: robust accuracy after each stage, in order, after the clean accuracy under "clean".
    """
    names = list(accuracies)
    before = [accuracies[name] for name in names[: names.index("square")]] if "square" in names else []
    # Later stages are no evidence: they start from the images that Square left.
    if len(before) > 1 and accuracies["square"] < min(before) - SQUARE_GAIN:
        warn(
            f"Square, which uses no gradient, broke {min(before) - accuracies['square']:.2%} of the images "
            "that gradient attacks left robust: the gradients may be masked; run Square with more queries "
            "or an adaptive attack"
        )


def warn_resumed(images: int, robust: float) -> None:
    """Warn of `images` that an earlier call broke; robust: accuracy of all calls together."""
    broken, returned = (
        ("1 image was", "is returned unperturbed, with its clean label")
        if images == 1
        else (f"{images} images were", "are returned unperturbed, with their clean labels")
    )
    warn(
        f"{broken} broken before this evaluation was resumed and {returned}: the "
        f"robust accuracy is {robust:.2%}, not that of the returned images; an evaluation in one go returns "
        "all adversarial images"
    )


def warn(text: str) -> None:
    """Issue a UserWarning."""
    warn_caller(text)
