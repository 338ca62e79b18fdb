"""Adam with a state per image, so that images of a batch may start, restart and leave independently."""

import torch
from torch import Tensor

DECAY_MEAN, DECAY_SQUARE, TINY = 0.9, 0.999, 1e-8


def adam_(point: Tensor, mean: Tensor, square: Tensor, grad: Tensor, *, lr: float, taken: Tensor) -> None:
    """One step of Adam down `grad` (Kingma & Ba 2015, torch.optim's defaults); overwrites all four tensors.

    Args:
        point, mean, square: (N, C, H, W), the iterate and Adam's moments, zero at first.
        grad: (N, C, H, W), used as scratch memory.
        taken: (N,) steps that each image has taken, this one included; or a scalar.
    """
    count = taken.to(point).view(-1, 1, 1, 1)
    mean.lerp_(grad, 1 - DECAY_MEAN)
    square.mul_(DECAY_SQUARE).addcmul_(grad, grad, value=1 - DECAY_SQUARE)
    # (lr / b1) mean / (sqrt(square) / b2 + tiny), with b1 and b2 combined to save a pass over the pixels.
    b1, b2 = 1 - DECAY_MEAN**count, (1 - DECAY_SQUARE**count).sqrt()
    step = torch.div(mean, torch.sqrt(square, out=grad).add_(TINY * b2), out=grad)
    point.sub_(step.mul_(lr * b2 / b1))
