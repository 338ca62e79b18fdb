"""What an attack must know of a network before it begins: that it returns logits, and whether a gradient
reaches its images.
"""

import torch
from torch import Tensor, nn

from fastdynat.attack_engine.network_comparison import same_draws
from fastdynat.attack_engine.network_modes import attack_mode
from fastdynat.models.logits import logits_of


def gradient_reaches(model: nn.Module, x: Tensor) -> bool:
    """Whether the logits of `model` in eval mode depend on images like `x` by differentiable operations.

    A step that is differentiable and flat, as rounding is, counts: only the attack sees that its gradients
    are 0. Modes, random streams and ``.grad`` stay as they are.

    Raises:
        UserError: `model` returns no logits.
    """
    with torch.inference_mode(False), torch.enable_grad(), same_draws(x.device), attack_mode(model, "eval"):
        leaf = x.detach().clone().requires_grad_()
        logits = logits_of(model(leaf), len(x))
        return (
            logits.requires_grad and torch.autograd.grad(logits.sum(), leaf, allow_unused=True)[0] is not None
        )
