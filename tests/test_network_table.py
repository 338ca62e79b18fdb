"""Any network: the drop-in attack is the plain one on the model itself, and leaves the model as it was."""

import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import odd_networks
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastdynat import PGD

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


@pytest.fixture(autouse=True)
def _outside() -> Iterator[None]:
    yield
    odd_networks.FACTOR, odd_networks.SETTINGS.factor = 1.0, 1.0
    os.environ.pop("FASTDYNAT_TEST_FACTOR", None)


def batch(n: int = 4, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.rand(n, 3, size, size, generator=generator), torch.arange(n)


def make(name: str, source: dict[str, Callable[[], nn.Module]]) -> nn.Module:
    torch.manual_seed(0)
    model = source[name]()
    if name == "lazy":
        model(torch.rand(2, 3, 16, 16))
    return with_statistics(model)


def attacked(attack: PGD, x: Tensor, y: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return attack(x, y)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", odd_networks.NETWORKS)
def test_odd_networks(name: str) -> None:
    model, (x, y) = make(name, odd_networks.NETWORKS).train(), batch()
    before = snapshot(model)
    attack = PGD(model, EPS, ALPHA, STEPS, random_start=False)
    torch.manual_seed(1)
    got = attacked(attack, x, y)
    again = attacked(attack, x, y)
    assert_untouched(model, before)
    torch.manual_seed(1)
    want = plain_pgd(model, x, y)
    assert same(want, x) < 0.6
    least = 0.97 if name in ("autocast inside", "noise from the global stream") else 0.995
    assert same(got, want) > least, attack.path
    assert same(again, got) > least
    print(name, "|", attack.path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", odd_networks.CHANGES)
def test_changes_are_followed(name: str) -> None:
    (x, y), (network, change) = batch(), odd_networks.CHANGES[name]
    model = make(name, {name: network}).train()
    attack = PGD(model, EPS, ALPHA, STEPS, random_start=False)
    old = plain_pgd(model, x, y)
    assert same(attacked(attack, x, y), old) > 0.995
    assert same(attacked(attack, x, y), old) > 0.995
    change(model)
    want = plain_pgd(model, x, y)
    assert same(want, old) < 0.98
    assert same(attacked(attack, x, y), want) > 0.995, attack.path
    print(name, "|", attack.path)
