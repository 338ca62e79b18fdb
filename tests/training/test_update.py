"""The optimiser as the step uses it: rate from a tensor, one fused pass, no garbage after an overflow."""

import math

import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from fastdynat.config import OptimConfig
from fastdynat.training.optimizers import build_optimizers


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, False), (0.9, True), (0.0, False)])
def test_equals_the_formula_while_the_rate_changes(momentum: float, nesterov: bool) -> None:
    """Sutskever et al. 2013 as PyTorch has it: v = m v + (g + wd p), p -= lr (g + wd p + m v) or lr v."""
    torch.manual_seed(0)
    network = nn.Linear(3, 2).double()
    weight, velocity, decay = network.weight.detach().clone(), torch.zeros(2, 3, dtype=torch.float64), 0.01
    lr = torch.zeros((), dtype=torch.float64)
    config = OptimConfig(lr=1.0, epochs=1, momentum=momentum, nesterov=nesterov, weight_decay=decay)
    (optimizer,) = build_optimizers({"model": network}, config, lr)
    for step in range(5):
        rate = 0.1 / (1 + step)
        gradient = torch.full_like(weight, math.sin(step))
        network.weight.grad, network.bias.grad = gradient.clone(), torch.zeros_like(network.bias)
        lr.fill_(rate)
        optimizer.step()
        direction = gradient + decay * weight
        velocity = momentum * velocity + direction
        weight = weight - rate * (direction + momentum * velocity if nesterov else velocity)
        torch.testing.assert_close(network.weight.detach(), weight, rtol=1e-12, atol=1e-12)


def test_a_first_update_that_overflows_leaves_nothing_behind() -> None:
    network = nn.Linear(256, 256)
    before = network.weight.detach().clone()
    (optimizer,) = build_optimizers({"model": network}, OptimConfig(lr=1.0, epochs=1), torch.tensor(0.1))
    scaler = GradScaler("cpu")
    scaler.scale(network.weight.sum() * float("inf") + network.bias.sum()).backward()
    scaler.step(optimizer)
    assert torch.equal(network.weight.detach(), before)
    assert not optimizer.state[network.weight]["momentum_buffer"].any()


def norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(6), nn.Linear(6, 2)
    )


@pytest.mark.parametrize("optimizers", ["separate", "joint"])
@pytest.mark.parametrize("decay_norms", [True, False])
def test_decay_of_normalisation_layers_is_a_choice(optimizers: str, decay_norms: bool) -> None:
    """With zero gradients only weight decay moves anything: p -= lr * wd * p."""
    networks = {"model": norms(), "guide": norms()}
    config = OptimConfig(
        lr=1.0,
        epochs=1,
        weight_decay=0.25,
        decay_norms=decay_norms,
        optimizers=optimizers,  # type: ignore[arg-type]
    )
    found = build_optimizers(networks, config, torch.tensor(0.5))
    assert len(found) == (1 if optimizers == "joint" else 2)
    for parameter in (p for net in networks.values() for p in net.parameters()):
        parameter.data.fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in found:
        optimizer.step()
    for net in networks.values():
        for name, parameter in net.named_parameters():
            expected = 1 - 0.5 * 0.25 * (decay_norms or name.startswith(("0.", "4.")))
            torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, expected), msg=name)


def test_without_normalisation_layers_nothing_is_set_apart() -> None:
    (optimizer,) = build_optimizers(
        {"model": nn.Linear(3, 2)}, OptimConfig(lr=1.0, epochs=1, decay_norms=False), torch.tensor(0.5)
    )
    assert len(optimizer.param_groups) == 1
