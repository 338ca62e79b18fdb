"""Learning-rate schedules against their definitions."""

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from fastdynat.config import OptimConfig
from fastdynat.engine.schedules import schedule_factor


def rates(spe: int, **config: object) -> list[float]:
    optim = OptimConfig(lr=0.1, **config)  # type: ignore[arg-type]
    assert optim.epochs is not None
    assert optim.lr is not None
    factor = schedule_factor(optim, spe)
    return [optim.lr * factor(step) for step in range(optim.epochs * spe)]


def test_release_schedule_over_its_100_epochs() -> None:
    """algorithms A.6: epoch 1 -> 0.02; 2-75 -> 0.1; 76-90 -> 0.01; 91-100 -> 0.001."""
    by_epoch = rates(3, epochs=100, schedule="release")[::3]
    assert by_epoch == pytest.approx([0.02] + [0.1] * 74 + [0.01] * 15 + [0.001] * 10)


def test_multistep_drops_at_its_shares() -> None:
    by_epoch = rates(2, epochs=8, schedule="multistep", milestones=(0.5, 0.75), gamma=0.1)[::2]
    assert by_epoch == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)


CASES = [("onecycle", 5, 7), ("onecycle", 1, 3), ("cosine", 5, 7), ("cosine", 1, 1)]


@pytest.mark.parametrize(("name", "epochs", "spe"), CASES)
def test_equals_torchs_scheduler(name: str, epochs: int, spe: int) -> None:
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    total = epochs * spe
    scheduler = (
        OneCycleLR(optimizer, 0.1, total_steps=total, cycle_momentum=False)
        if name == "onecycle"
        else CosineAnnealingLR(optimizer, total)
    )
    expected = []
    for _ in range(total):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates(spe, epochs=epochs, schedule=name) == pytest.approx(expected)


def test_constant() -> None:
    assert set(rates(4, epochs=3, schedule="constant")) == {0.1}
