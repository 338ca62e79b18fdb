"""Formulas written down without our code, in loops and float64: what tests of whole steps compare with."""

from collections.abc import Callable

import torch
from support.stepping import EPS, STEP, STEPS, K
from torch import Tensor, nn

Goal = Callable[
    [Tensor, int], Tensor
]  # (log-probabilities of an image, its index) -> what its attack drives up


def log_probs(z: Tensor) -> Tensor:
    return z - z.exp().sum(-1, keepdim=True).log()


def ce_goal(y: Tensor) -> Goal:
    return lambda log_q, i: -log_q[y[i]]


def kl_goal(model: nn.Module, x: Tensor) -> Goal:
    model.eval()
    with torch.no_grad():
        log_p = torch.cat([log_probs(model(x[i : i + 1])) for i in range(len(x))])
    return lambda log_q, i: sum(log_p[i, k].exp() * (log_p[i, k] - log_q[k]) for k in range(K))  # type: ignore[return-value]


def attack(model: nn.Module, x: Tensor, start: Tensor, goal: Goal) -> tuple[Tensor, list[list[int]]]:
    """PGD image by image in eval mode, and the class of each iterate that a step was taken from."""
    model.eval()
    attacked, predictions = [], []
    for i in range(len(start)):
        xi, seen = start[i : i + 1], []
        for _ in range(STEPS):
            xi = xi.detach().requires_grad_()
            logits = model(xi)[0]
            seen.append(int(logits.argmax()))
            xi = xi.detach() + STEP * torch.sign(torch.autograd.grad(goal(log_probs(logits), i), xi)[0])
            xi = torch.clamp(torch.min(torch.max(xi, x[i : i + 1] - EPS), x[i : i + 1] + EPS), 0, 1)
        attacked.append(xi)
        predictions.append(seen)
    model.train()
    return torch.cat(attacked), predictions
