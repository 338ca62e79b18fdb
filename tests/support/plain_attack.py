"""PGD in a few lines of PyTorch, and the state of a network before and after an attack."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

EPS, ALPHA, STEPS = 8 / 255, 2 / 255, 2


def plain_pgd(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """PGD without a random start, on the model itself in eval mode."""
    modes = [(module, module.training, dict(vars(module))) for module in model.modules()]
    model.eval()
    x_adv = x.clone()
    for _ in range(STEPS):
        leaf = x_adv.clone().requires_grad_()
        grad = torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)[0]
        x_adv = torch.clamp(x + torch.clamp(x_adv + ALPHA * grad.sign() - x, -EPS, EPS), 0, 1)
    for module, training, before in modes:
        module.training = training
        if "noise" in before:
            module.noise = before["noise"]
    return x_adv.detach()


def same(one: Tensor, other: Tensor) -> float:
    """Share of equal pixels. Rounding turns the signs of the gradients that are next to 0."""
    return float(((one - other).abs() < 1e-5).float().mean())


def with_statistics(model: nn.Module, seed: int = 0) -> nn.Module:
    """Norms and constants away from their start, as after training."""
    generator = torch.Generator().manual_seed(seed)

    def between(low: float, high: float, like: Tensor) -> Tensor:
        return low + (high - low) * torch.rand(like.shape, generator=generator)

    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            module.running_mean.copy_(between(-0.2, 0.2, module.running_mean))
            module.running_var.copy_(between(0.5, 1.5, module.running_var))
        if isinstance(module, _BatchNorm) and module.affine:
            module.weight.data.copy_(between(0.7, 1.3, module.weight))
            module.bias.data.copy_(between(-0.2, 0.2, module.bias))
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            parameter.data.copy_(between(-0.05, 0.05, parameter))  # heads that start at 0
    return model


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    state = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    return (
        state,
        [p.grad for p in model.parameters()],
        [p.requires_grad for p in model.parameters()],
        [m.training for m in model.modules()],
    )


def assert_untouched(model: nn.Module, before: tuple[Any, ...]) -> None:
    now = snapshot(model)
    assert now[0].keys() == before[0].keys()
    assert all(torch.equal(now[0][name], before[0][name]) for name in before[0])
    assert all(one is other for one, other in zip(now[1], before[1], strict=True))
    assert now[2:] == before[2:]


def batch(n: int = 4, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.rand(n, 3, size, size, generator=generator), torch.arange(n)
