"""Terms and passes that several methods share."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastdynat.attack_engine.goal import kl_from_log_probs, wide
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.data import Batch
from fastdynat.distributed import batch_world
from fastdynat.errors import UserError
from fastdynat.methods.base import Networks

KlMean = Literal["tenth", "entries", "batch"]


def check_one_step(spec: PGDSpec, method: str, other: str = "madry") -> None:
    """Raise UserError unless `spec` has one step; `other` is a method that takes several."""
    if spec.steps != 1:
        raise UserError(f"{method} takes 1 step, got steps {spec.steps}; --method {other} takes several")


def check_linf(spec: PGDSpec, method: str, other: str = "madry") -> None:
    """Raise UserError unless `spec` is under linf; `other` is a method that takes any norm."""
    if spec.norm != "linf":
        raise UserError(f"{method} is a method for linf, got norm {spec.norm}; --method {other} takes it")


def batch_share(count: Tensor | None, batch: Batch) -> Tensor:
    """`count` images as a share of the batch, for a log; losses that get the labels return counts."""
    assert count is not None
    return count / len(batch.labels)


def mean_over(values: Tensor, chosen: Tensor, batch: Batch) -> Tensor:
    """The mean of `values` (N,) over the `chosen` (N,) images of the global batch; 0 where none is chosen.

    What is returned is this process's summand: such means, weighted by the processes' shares as every loss
    is, add up to the mean over all of them; a log takes `logged_mean`. One number is summed over the
    processes. A micro-batch counts its own images only (`Method.couples_images`).
    """
    count = batch_world().sum_(chosen.sum()).clamp_min(1).to(values.dtype)
    share = len(chosen) / batch.share.images_of_all_ranks
    return (values * chosen).sum() / (count * share)


def accuracy(logits: Tensor, batch: Batch) -> Tensor:
    """Share of the batch that `logits` classify correctly, for a log."""
    return (logits.detach().argmax(1) == batch.labels).float().mean()


def clean_statistics_pass(nets: Networks, batch: Batch) -> None:
    """Update the model's running statistics by the clean batch, and nothing else."""
    statistics_pass(nets, batch.x)


def statistics_pass(nets: Networks, x: Tensor) -> None:
    """Update the model's running statistics by `x`, and nothing else."""
    with torch.no_grad():
        nets.model(x)


def guide_logits(nets: Networks, x: Tensor) -> Tensor:
    """Logits (N, K) of the frozen guide in eval mode, at least float32, without gradient."""
    assert nets.guide_eval is not None
    with torch.no_grad():
        return wide(nets.guide_eval(x))


def mean_kl(
    from_logits: Tensor,
    logits: Tensor,
    *,
    temperature: float = 1.0,
    mean: KlMean = "batch",
    weights: Tensor | None = None,
) -> Tensor:
    """KL(softmax(from_logits / T) || softmax(logits / T)), a scalar with gradient through both arguments.

    Args:
        mean: "batch" averages the sum over classes over the batch; "entries" divides that by K, as torch's
            `KLDivLoss` does, and "tenth" by 10.
        weights: (N,) constant factors of the images' divergences; None is 1.
    """
    over = {"batch": 1, "entries": logits.shape[1], "tenth": 10}[mean]
    log_p = (wide(from_logits) / temperature).log_softmax(1)
    kl = kl_from_log_probs(log_p, wide(logits) / temperature)
    return (kl if weights is None else weights.to(kl.dtype) * kl).mean() / over
