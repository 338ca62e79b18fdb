"""The losses of APGD with their gradients at the logits."""

from typing import Literal

import torch
from torch import Tensor

from fastdynat.attack_engine.goal import cross_entropy_order
from fastdynat.ops import attack_logit_grad
from fastdynat.ops.attack_logit_grad import inverse_power_of_two

APGDLoss = Literal["ce", "dlr", "dlr-t"]


def targeted_dlr(logits: Tensor, labels: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Targeted DLR ``(z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2)``, (N,), and its gradient (N, K).

    Croce & Hein 2020, eq. 7. Needs four classes. Where the denominator is 0, value and gradient are 0.
    """
    top = logits.topk(4, dim=1)
    gap = top.values[:, :1] - top.values[:, 2:].mean(1, keepdim=True)
    inverse = torch.where(gap > 0, 1 / gap, 0)
    pair = torch.stack((target, labels), 1)
    ahead = logits.gather(1, pair)
    value = (ahead[:, :1] - ahead[:, 1:]) * inverse
    signs = torch.tensor([[1.0, -1.0]], dtype=logits.dtype, device=logits.device)
    parts = torch.tensor([[-1.0, 0.0, 0.5, 0.5]], dtype=logits.dtype, device=logits.device)
    grad = torch.zeros_like(logits).scatter_add_(1, pair, signs * inverse)
    return value.squeeze(1), grad.scatter_add_(1, top.indices, parts * value * inverse)


def loss_and_grad(
    loss_name: APGDLoss, logits: Tensor, labels: Tensor, target: Tensor, *, rescale: bool
) -> tuple[Tensor, Tensor]:
    """The loss (N,), for "ce" as `cross_entropy_order` gives it, and its gradient (N, K) at the logits."""
    if loss_name != "dlr-t":
        grad, loss = attack_logit_grad(logits, labels, loss=loss_name, rescale=rescale)
        return cross_entropy_order(logits, labels) if loss_name == "ce" else loss, grad
    loss, grad = targeted_dlr(logits, labels, target)
    return loss, grad * inverse_power_of_two(grad.abs().amax(1, keepdim=True)) if rescale else grad
