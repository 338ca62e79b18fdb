"""The result of an attack."""

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastdynat.errors import UserError

R = TypeVar("R", bound="AttackResult")


@dataclass(frozen=True)
class AttackResult:
    """Adversarial images and the gradients that led to them.

    Attributes:
        x_adv: (N, C, H, W), detached, in the ball and in [0, 1].
        zero_grads: scalar int64 on the device: how many of the `gradients` were zero (or NaN) in every pixel
            although the goal was not met (`AttackGoal.satisfied`). Such a step does not move its image: a
            sign of saturation, underflow or gradient masking.
        gradients: image gradients computed, at most N * steps * restarts.
        kept: (N,) int64, for a goal with `track`: the number of iterates, among those from which a step was
            taken, at which the network still predicted the goal's class.
        norm: (N,) int64, for the worst of several norms: which of them, counted from 0; else None.
        steps: of the run that `kept` counts in; of several norms each has as many.
    """

    x_adv: Tensor
    zero_grads: Tensor
    gradients: int
    kept: Tensor | None = None
    norm: Tensor | None = None
    steps: int = 0

    def clone(self: R) -> R:
        """A copy that shares no tensors."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors: dict[str, Any] = {
            name: value.clone() for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)


def as_attack_result(found: object, x: Tensor, name: str) -> AttackResult:
    """`found`, which the attack called `name` returned for `x`; images alone become `AttackResult.x_adv`.

    Raises:
        UserError: it is neither.
    """
    if isinstance(found, Tensor):
        return AttackResult(found.detach(), torch.zeros((), dtype=torch.int64, device=x.device), 0)
    if not isinstance(found, AttackResult):
        raise UserError(f"{name} returned {type(found).__name__}; return AttackResult or images")
    return found
