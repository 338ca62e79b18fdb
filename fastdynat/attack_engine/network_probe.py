"""Probe of a network before an attack: it returns logits, and a gradient reaches its images."""

import torch
from torch import Tensor, nn

from fastdynat.attack_engine.network_comparison import preserve_rng
from fastdynat.attack_engine.network_modes import attack_mode
from fastdynat.models.logits import logits_of


def gradient_reaches(model: nn.Module, x: Tensor) -> bool:
    """True if the logits of `model` in eval mode depend differentiably on images like `x`.

    A differentiable step function such as rounding counts; only the attack can see that its gradients are 0.
    Modes, random streams and ``.grad`` stay as they are.

    Raises:
        UserError: `model` returns no logits.
    """
    with torch.inference_mode(False), torch.enable_grad(), preserve_rng(x.device), attack_mode(model, "eval"):
        leaf = x.detach().clone().requires_grad_()
        logits = logits_of(model(leaf), len(x))
        return (
            logits.requires_grad and torch.autograd.grad(logits.sum(), leaf, allow_unused=True)[0] is not None
        )
