"""The worst of several attacks, image by image (max strategy of Tramer & Boneh 2019, arXiv 1904.13000)."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastdynat.attack_engine.attack_result import AttackResult
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.lengths import per_image


class AttackedReplica(Protocol):
    """The part of `AttackEngine` that tells results apart."""

    def to_memory_format(self, x: Tensor) -> Tensor: ...

    def logits(self, x: Tensor) -> Tensor: ...


def worst_of(engine: AttackedReplica, goal: AttackGoal, results: Sequence[AttackResult]) -> AttackResult:
    """For each image that of `results` with the highest value of `goal`; of equal ones the first.

    One forward pass of the replica per result.
    """
    first = results[0]
    x_adv, kept = first.x_adv, first.kept
    value, norm = _value(engine, goal, first), torch.zeros(len(x_adv), dtype=torch.int64, device=x_adv.device)
    for number, result in enumerate(results[1:], 1):
        found = _value(engine, goal, result)
        better = found > value
        value, norm = torch.where(better, found, value), norm.masked_fill(better, number)
        x_adv = torch.where(per_image(better, x_adv), result.x_adv, x_adv)
        kept = None if kept is None or result.kept is None else torch.where(better, result.kept, kept)
    zero_grads = torch.stack([result.zero_grads for result in results]).sum()
    gradients = sum(result.gradients for result in results)
    return AttackResult(x_adv, zero_grads, gradients, kept, norm, steps=first.steps)


def _value(engine: AttackedReplica, goal: AttackGoal, result: AttackResult) -> Tensor:
    with torch.no_grad():
        value = goal.order(engine.logits(engine.to_memory_format(result.x_adv)))
    return torch.where(value.isnan(), -torch.inf, value)
