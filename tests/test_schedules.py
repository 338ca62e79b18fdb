"""Learning-rate schedules against their definitions."""

import numpy as np
import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, LRScheduler, OneCycleLR

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


def torchs_rates(name: str, total: int, warmup: float) -> list[float]:
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    if name == "onecycle":
        scheduler: LRScheduler = OneCycleLR(optimizer, 0.1, total_steps=total, pct_start=warmup, cycle_momentum=False)
    elif name == "triangular":
        up, down = warmup * total, (1 - warmup) * total
        scheduler = CyclicLR(optimizer, 0.0, 0.1, step_size_up=up, step_size_down=down, cycle_momentum=False)
    else:
        scheduler = CosineAnnealingLR(optimizer, total)
    expected = []
    for _ in range(total):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return expected


CASES = [("onecycle", 5, 7), ("onecycle", 1, 3), ("cosine", 5, 7), ("cosine", 1, 1), ("triangular", 5, 7), ("triangular", 1, 3)]


@pytest.mark.parametrize(("name", "epochs", "spe"), CASES)
def test_equals_torchs_scheduler(name: str, epochs: int, spe: int) -> None:
    usual = {"onecycle": 0.3, "triangular": 0.5}.get(name, 0.0)
    assert rates(spe, epochs=epochs, schedule=name) == pytest.approx(torchs_rates(name, epochs * spe, usual))


@pytest.mark.parametrize("name", ["onecycle", "triangular"])
@pytest.mark.parametrize("warmup", [0.025, 0.2, 0.4, 0.9])
def test_the_peak_moves_as_torchs_does(name: str, warmup: float) -> None:
    got = rates(20, epochs=10, schedule=name, warmup=warmup)
    assert got == pytest.approx(torchs_rates(name, 200, warmup), abs=1e-12)
    assert max(got) == pytest.approx(0.1, rel=1e-3)


def test_triangular_is_fast_adversarial_trainings_interpolation() -> None:
    """Wong et al. 2020: np.interp over the epochs [0, 2/5, 1], here with its share as --warmup."""
    got = rates(10, epochs=15, schedule="triangular", warmup=0.4)
    assert got == pytest.approx(np.interp(np.arange(150) / 10, [0, 6, 15], [0, 0.1, 0]))


def test_triangular_without_a_warm_up_falls_from_the_peak() -> None:
    assert rates(1, epochs=4, schedule="triangular", warmup=0.0) == pytest.approx([0.1, 0.075, 0.05, 0.025])


@pytest.mark.parametrize("name", ["release", "multistep", "cosine", "onecycle", "triangular", "constant"])
def test_a_burn_in_is_at_the_peak_and_the_schedule_comes_after_it(name: str) -> None:
    assert rates(3, epochs=9, burn_in=4, schedule=name) == [0.1] * 12 + rates(3, epochs=5, schedule=name)


def test_constant() -> None:
    assert set(rates(4, epochs=3, schedule="constant")) == {0.1}
