"""What guided methods have in common."""

import torch
from torch import Tensor

from fastdynat.attack_engine.goal import kl_from_log_probs, wide
from fastdynat.methods.base import Networks
from fastdynat.methods.options.taught import KlMean


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
