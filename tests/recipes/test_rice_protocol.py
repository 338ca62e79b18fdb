"""Five steps of Rice et al.'s and AT-AWP's loops, transcribed in float64, against ours by the recipes."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.graph_sim import SimulatedRecorder
from support.stepping import EPS, LR, STEP, STEPS, drawn_start, make_batch, moved_network, train_step
from torch import Tensor, nn

from fastdynat.config import OptimConfig
from fastdynat.execution.graphed_call import WARM_UP_CALLS
from fastdynat.methods import Madry, MadryOptions
from fastdynat.recipes import read_recipe
from fastdynat.training.schedules import schedule_factor
from fastdynat.training.step import TrainStep

OPTIONS = {"bn_attack_forward": True, "bn_clean_after": True}
DECAY, MOMENTUM, GAMMA, UPDATES = 0.05, 0.9, 0.05, 5
# Two epochs of three updates, and the drop between them.
SCHEDULE = OptimConfig(lr=LR, epochs=2, schedule="multistep", milestones=(0.5,), schedule_ahead=1)


def released_attack(model: nn.Module, x: Tensor, y: Tensor, start: Tensor) -> Tensor:
    """The train-mode attack, whose passes all move the running statistics, and a last look at its loss."""
    delta = (start - x).requires_grad_()
    for _ in range(STEPS):
        loss = F.cross_entropy(model(x + delta), y)
        gradient = torch.autograd.grad(loss, delta)[0]
        moved = torch.clamp(delta.detach() + STEP * gradient.sign(), -EPS, EPS)
        delta = torch.clamp(moved, 0 - x, 1 - x).requires_grad_()
    F.cross_entropy(model(x + delta), y, reduction="none")
    return delta.detach()


def released_step(
    model: nn.Module, optimizer: torch.optim.SGD, x: Tensor, y: Tensor, start: Tensor, gamma: float
) -> Tensor:
    """One batch of the loop: attack, perturbation by a proxy, update, restoration, clean accuracy."""
    model.train()
    x_adv = torch.clamp(x + released_attack(model, x, y, start), 0, 1)
    moves: dict[str, Tensor] = {}
    if gamma:
        proxy = copy.deepcopy(model)
        proxy.zero_grad()
        (-F.cross_entropy(proxy(x_adv), y)).backward()
        for name, p in proxy.named_parameters():
            old = model.get_parameter(name).detach()
            if old.dim() > 1:
                step = -0.01 * p.grad  # type: ignore[operator]
                moves[name] = gamma * old.norm() / (step.norm() + 1e-20) * step
    for name, move in moves.items():
        model.get_parameter(name).data.add_(move)
    loss = F.cross_entropy(model(x_adv), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    for name, move in moves.items():
        model.get_parameter(name).data.sub_(move)
    model(x)
    return loss.detach()


def our_step(model: nn.Module, gamma: float, **options: Any) -> TrainStep:
    step = train_step(
        Madry(MadryOptions(**OPTIONS)),
        model,
        None,
        attack_bn="train",
        start="uniform",
        awp=gamma,
        weight_decay=DECAY,
        momentum=MOMENTUM,
        **options,
    )
    step.lr_factor = schedule_factor(SCHEDULE, 3)
    return step


def test_these_are_the_recipes_options() -> None:
    for name in ("rice2020", "at-awp"):
        values = read_recipe(name).values
        assert {
            **OPTIONS,
            "attack_bn": "train",
            "start": "uniform",
            "schedule_ahead": 1,
        }.items() <= values.items()


@pytest.mark.parametrize("gamma", [0.0, GAMMA], ids=["rice2020", "at-awp"])
def test_five_steps_equal_the_release(gamma: float) -> None:
    batch, model = make_batch(), moved_network(1)
    reference = copy.deepcopy(model)
    optimizer = torch.optim.SGD(reference.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    step = our_step(model, gamma)
    for update in range(UPDATES):
        t = (update + 1) / 3  # epoch + (i + 1) / number of batches
        optimizer.param_groups[0].update(lr=LR if t / 2 < 0.5 else LR / 10)
        start = drawn_start(batch.x, "uniform")
        logs = step(batch)
        torch.testing.assert_close(
            logs["loss"], released_step(reference, optimizer, batch.x, batch.labels, start, gamma)
        )
        assert float(step.optimizers[0].param_groups[0]["lr"]) == pytest.approx(LR if update < 2 else LR / 10)
        for key, value in model.state_dict().items():
            torch.testing.assert_close(
                value, reference.state_dict()[key], rtol=1e-9, atol=1e-12, msg=f"{key}, {update}"
            )
    passes = int(model.state_dict()["1.num_batches_tracked"]) - 1  # one is of `moved_network`
    assert passes == UPDATES * (STEPS + 3)


@pytest.mark.parametrize("gamma", [0.0, GAMMA])
def test_captured_steps_do_the_same(gamma: float) -> None:
    recorder, states = SimulatedRecorder(), []
    for graphs in (recorder, None):
        model = moved_network(1)
        step = our_step(model, gamma, recorder=graphs)
        torch.manual_seed(3)
        for _ in range(WARM_UP_CALLS + 3):
            step(make_batch())
        states.append(model.state_dict())
    assert (recorder.captured, recorder.replayed) == (1, 3)
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_without_the_options_the_passes_are_left_out() -> None:
    """A run stored before there were such options goes on as it began."""
    model = moved_network(1)
    step = train_step(Madry(MadryOptions()), model, None, attack_bn="train", start="uniform")
    step(make_batch())
    assert int(model.state_dict()["1.num_batches_tracked"]) - 1 == STEPS + 1
