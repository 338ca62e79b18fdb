"""What an attack returns."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AttackResult:
    """What an attack returns.

    Attributes:
        x_adv: (N, C, H, W), detached, in the ball and in [0, 1].
        zero_grads: scalar int64 on the device: how many of the `gradients` were zero (or NaN) in every pixel,
            though the goal was not satisfied (`AttackGoal.satisfied`). Such an image is not attacked at all:
            saturation, underflow or masking, to be watched.
        gradients: image gradients computed, at most N * steps * restarts.
        kept: (N,) int64, for a goal that is tracked: at how many of the iterates that a step was taken from
            the network still gave the goal's class.
    """

    x_adv: Tensor
    zero_grads: Tensor
    gradients: int
    kept: Tensor | None = None
