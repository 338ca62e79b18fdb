"""What guided methods have in common."""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from fastdynat.attacks import AttackGoal, kl_from_log_probs, wide
from fastdynat.data import Batch
from fastdynat.errors import UserError
from fastdynat.methods.base import Networks

KlMean = Literal["tenth", "entries", "batch"]


def check_numbers(options: Any, *, at_least_zero: tuple[str, ...] = (), above_zero: tuple[str, ...] = ()) -> None:
    """Raise UserError for a field of `options` that is out of range, NaN and infinity included."""
    for name in at_least_zero:
        if not 0 <= getattr(options, name) < math.inf:
            raise UserError(f"{name} must be >= 0, got {getattr(options, name):g}")
    for name in above_zero:
        if not 0 < getattr(options, name) < math.inf:
            raise UserError(f"{name} must be above 0, got {getattr(options, name):g}")


def check_share(options: Any, name: str) -> None:
    """Raise UserError where the field `name` of `options` is not in [0, 1]."""
    if not 0 <= getattr(options, name) <= 1:
        raise UserError(f"{name} must be in [0, 1], got {getattr(options, name):g}")


def kl_to_self(nets: Networks, batch: Batch) -> AttackGoal:
    """KL(p(x) || p(x')), both of the attacked network: the inner objective of TRADES (arXiv 1901.08573)."""
    with torch.no_grad():
        return AttackGoal("kl", wide(nets.attacked(batch.x)).log_softmax(1))


def teacher_logits(nets: Networks, x: Tensor) -> Tensor:
    """(N, K) of the frozen guide, at least float32, without gradient."""
    assert nets.guide_eval is not None
    with torch.no_grad():
        return wide(nets.guide_eval(x))


def mean_kl(from_logits: Tensor, logits: Tensor, *, temperature: float = 1.0, mean: KlMean = "batch") -> Tensor:
    """KL(softmax(from_logits / T) || softmax(logits / T)), scalar, from log-probabilities; gradient through both arguments.

    mean: "batch" is over the batch of the sum over classes; "entries" that divided by K (torch's `KLDivLoss`), "tenth" by 10.
    """
    over = {"batch": 1, "entries": logits.shape[1], "tenth": 10}[mean]
    log_p = (wide(from_logits) / temperature).log_softmax(1)
    return kl_from_log_probs(log_p, wide(logits) / temperature).mean() / over


def accuracy(logits: Tensor, batch: Batch) -> Tensor:
    """Share of the batch's images that `logits` give the true class, for a log."""
    return (logits.detach().argmax(1) == batch.labels).float().mean()
