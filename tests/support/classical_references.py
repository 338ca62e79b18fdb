"""Losses of the classical methods, written from their formulas, and a training to compare them in."""

from typing import Any

import torch
from support.stepping import (
    N,
)
from torch import Tensor

from fastdynat.data import Batch
from fastdynat.training.step import TrainStep


def mean_kl(log_p: Tensor, log_q: Tensor, weights: list[float] | list[Tensor]) -> Any:
    return sum(weights[i] * (log_p[i].exp() * (log_p[i] - log_q[i])).sum() for i in range(N)) / N


def mean_ce(log_p: Tensor, y: Tensor, weights: list[float]) -> Any:
    return sum(-weights[i] * log_p[i, y[i]] for i in range(N)) / N


EPOCH, EPOCHS = (16, 7), 12


def train(step: TrainStep, epochs: int = EPOCHS) -> tuple[list[dict[str, float]], Tensor]:
    """Logs of every step, and all weights and buffers at the end."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(5)
    logs = []
    like = next(step.networks.raw["model"].parameters())
    step.method.epochs = epochs
    for epoch in range(epochs):
        step.start_epoch(epoch)
        for size in EPOCH:
            x = torch.rand(size, 3, 8, 8, generator=generator, dtype=like.dtype).to(like.device)
            labels = torch.randint(10, (size,), generator=generator).to(like.device)
            out = step(Batch(x, labels, torch.arange(size, device=like.device)))
            logs.append({key: float(value) for key, value in out.items()})
    return logs, torch.cat(
        [t.double().flatten() for net in step.networks.raw.values() for t in net.state_dict().values()]
    )
