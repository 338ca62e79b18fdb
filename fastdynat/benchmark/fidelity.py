"""Whether an attack that is timed is none the weaker for its speed."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdynat.attacks import AttackGoal, PGDSpec, attack_mode, pgd
from fastdynat.benchmark.work import Attack
from fastdynat.data import Batch
from fastdynat.ops import use_backend

LOSS_MARGIN = 0.005  # of the reference's loss
SEED = 7


@dataclass(frozen=True)
class Fidelity:
    """Mean cross-entropy and accuracy on the attacked images in float32; `problem` is "" where the attack may be timed."""

    loss: float
    accuracy: float
    reference_loss: float
    reference_accuracy: float
    images: int
    problem: str


@contextmanager
def exact() -> Iterator[None]:
    """Float32 that is float32 (TF32 keeps 10 bits of the mantissa), and the operators' reference implementation."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        with use_backend("eager"):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def check_attack(model: nn.Module, attack: Attack, batches: Sequence[Batch], spec: PGDSpec, *, bn: str) -> Fidelity:
    """Compare `attack` on `model` with `fastdynat.attacks.pgd` in float32, eager, from the same start, batch norm in mode `bn`.

    Labels are the model's own predictions, so that every image has something to lose. A problem: a pixel outside the ball or
    [0, 1], a loss more than 0.5 % below the reference's, an accuracy more than two standard errors (and one image) above.
    """
    totals = torch.zeros(4, dtype=torch.float64)
    outside, images = 0.0, 0
    for batch in batches:
        with exact(), attack_mode(model, "eval"), torch.no_grad():
            labels = model(batch.x).argmax(1)
        torch.manual_seed(SEED)
        x_adv = attack(batch.x, labels)
        torch.manual_seed(SEED)
        with exact():
            reference = pgd(model, batch.x, AttackGoal("ce", labels), spec, bn=bn).x_adv
            totals += torch.cat([_reached(model, adv, labels) for adv in (x_adv, reference)])
        outside = max(outside, _outside(x_adv, batch.x, spec))
        images += len(labels)
    loss, accuracy, reference_loss, reference_accuracy = (totals / images).tolist()
    deviation = math.sqrt(reference_accuracy * (1 - reference_accuracy) / images)
    problem = ""
    if outside > 1e-6:
        problem = f"{outside:.1g} outside the ball or [0, 1]"
    elif not loss >= reference_loss * (1 - LOSS_MARGIN):
        problem = f"reaches a loss of {loss:.4g}, the reference {reference_loss:.4g}"
    elif accuracy > reference_accuracy + 2 * deviation + 1 / images:
        problem = f"leaves an accuracy of {accuracy:.1%}, the reference {reference_accuracy:.1%}"
    return Fidelity(loss, accuracy, reference_loss, reference_accuracy, images, problem)


def _reached(model: nn.Module, x_adv: Tensor, labels: Tensor) -> Tensor:
    """Sums over the images: loss, and how many are still right."""
    with attack_mode(model, "eval"), torch.no_grad():
        logits = model(x_adv)
        loss = AttackGoal("ce", labels).per_image(logits).double().sum()
        return torch.stack([loss, (logits.argmax(1) == labels).sum().double()]).cpu()


def _outside(x_adv: Tensor, x: Tensor, spec: PGDSpec) -> float:
    delta = x_adv - x
    distance = delta.abs().amax() if spec.norm == "linf" else delta.flatten(1).norm(dim=1).amax()
    return float(torch.stack([distance - spec.eps, x_adv.amax() - 1, -x_adv.amin()]).amax())
