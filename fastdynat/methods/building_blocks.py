"""Terms and passes that several methods' losses are made of."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastdynat.attack_engine.goal import kl_from_log_probs, wide
from fastdynat.data import Batch
from fastdynat.methods.base import Networks

KlMean = Literal["tenth", "entries", "batch"]


def share(count: Tensor | None, batch: Batch) -> Tensor:
    """`count` of the batch's images as a share, for a log; a loss that was given the labels has counts."""
    assert count is not None
    return count / len(batch.labels)


def accuracy(logits: Tensor, batch: Batch) -> Tensor:
    """The share of the batch's images that `logits` get right, for a log."""
    return (logits.detach().argmax(1) == batch.labels).float().mean()


def clean_statistics_pass(nets: Networks, batch: Batch) -> None:
    """Let the clean batch move the model's running statistics; nothing else comes of it."""
    statistics_pass(nets, batch.x)


def statistics_pass(nets: Networks, x: Tensor) -> None:
    """Let `x` move the model's running statistics; nothing else comes of it."""
    with torch.no_grad():
        nets.model(x)


def teacher_logits(nets: Networks, x: Tensor) -> Tensor:
    """(N, K) of the frozen guide, at least float32, without gradient."""
    assert nets.guide_eval is not None
    with torch.no_grad():
        return wide(nets.guide_eval(x))


def mean_kl(
    from_logits: Tensor, logits: Tensor, *, temperature: float = 1.0, mean: KlMean = "batch"
) -> Tensor:
    """KL(softmax(from_logits / T) || softmax(logits / T)), scalar, from log-probabilities; gradient through
    both arguments.

    mean: "batch" is over the batch of the sum over classes; "entries" that divided by K (torch's
    `KLDivLoss`), "tenth" by 10.
    """
    over = {"batch": 1, "entries": logits.shape[1], "tenth": 10}[mean]
    log_p = (wide(from_logits) / temperature).log_softmax(1)
    return kl_from_log_probs(log_p, wide(logits) / temperature).mean() / over
