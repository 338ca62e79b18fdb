"""Learning-rate schedules against their definitions."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CyclicLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
)

from fastdynat.config import AttackConfig, OptimConfig
from fastdynat.training.schedules import attack_steps, momentum_at, schedule_factor


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


def torchs(
    name: str, total: int, warmup: float, *, cycle: bool = False, by: int = 1
) -> tuple[list[float], list[float]]:
    """Rates and momenta of torch's scheduler, each `by` times."""
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    if name == "onecycle":
        scheduler: LRScheduler = OneCycleLR(
            optimizer, 0.1, total_steps=total, pct_start=warmup, cycle_momentum=cycle
        )
    elif name == "triangular":
        up, down = warmup * total, (1 - warmup) * total
        scheduler = CyclicLR(optimizer, 0.0, 0.1, step_size_up=up, step_size_down=down, cycle_momentum=cycle)
    else:
        scheduler = CosineAnnealingLR(optimizer, total)
    rates, momenta = [], []
    for _ in range(total):
        rates += [optimizer.param_groups[0]["lr"]] * by
        momenta += [optimizer.param_groups[0]["momentum"]] * by
        optimizer.step()
        scheduler.step()
    return rates, momenta


def torchs_rates(name: str, total: int, warmup: float) -> list[float]:
    return torchs(name, total, warmup)[0]


def momenta(spe: int, **config: object) -> list[float]:
    optim = OptimConfig(lr=0.1, **config)  # type: ignore[arg-type]
    assert optim.epochs is not None
    at = momentum_at(optim, spe)
    return [at(step) for step in range(optim.epochs * spe)]


@pytest.mark.parametrize("name", ["onecycle", "triangular"])
@pytest.mark.parametrize("warmup", [0.025, 0.2, 0.5])
@pytest.mark.parametrize("by", ["step", "epoch"])
def test_the_momentum_cycles_as_torchs_does_by_default(name: str, warmup: float, by: str) -> None:
    """0.95 -> 0.85 -> 0.95 for OneCycleLR, 0.9 -> 0.8 -> 0.9 for CyclicLR; by update or ten-step epoch."""
    config = {"epochs": 80, "schedule": name, "warmup": warmup, "cycle_momentum": True, "schedule_by": by}
    total, times = (80, 10) if by == "epoch" else (800, 1)
    want = torchs(name, total, warmup, cycle=True, by=times)
    assert rates(10, **config) == pytest.approx(want[0], abs=1e-12)
    got = momenta(10, **config)
    assert got == pytest.approx(want[1], abs=1e-12)
    assert len({round(m, 6) for m in got}) > 5
    assert rates(10, **config) == rates(10, **{**config, "cycle_momentum": False})


def test_the_cycle_has_the_momenta_that_are_given_and_begins_after_a_burn_in() -> None:
    config = {
        "schedule": "onecycle",
        "cycle_momentum": True,
        "base_momentum": 0.5,
        "max_momentum": 0.7,
        "momentum": 0.3,
    }
    plain = momenta(3, epochs=5, **config)
    assert (plain[0], min(plain), plain[-1]) == pytest.approx((0.7, 0.5, 0.7), abs=5e-3)
    assert momenta(3, epochs=9, burn_in=4, **config) == [0.3] * 12 + plain
    assert set(momenta(3, epochs=5, schedule="onecycle", momentum=0.3)) == {0.3}


@pytest.mark.parametrize("name", ["release", "multistep", "cosine", "onecycle", "triangular"])
def test_ahead_is_the_next_updates_rate(name: str) -> None:
    usual = rates(4, epochs=8, schedule=name)
    ahead = rates(4, epochs=8, schedule=name, schedule_ahead=1)
    assert ahead[:-1] == usual[1:]
    assert 0 <= ahead[-1] <= usual[-1]


def test_a_burn_in_may_have_a_rate_of_its_own() -> None:
    assert rates(3, epochs=9, burn_in=4, schedule="onecycle", burn_in_lr=0.4) == [0.4] * 12 + rates(
        3, epochs=5, schedule="onecycle"
    )


CASES = [
    ("onecycle", 5, 7),
    ("onecycle", 1, 3),
    ("cosine", 5, 7),
    ("cosine", 1, 1),
    ("triangular", 5, 7),
    ("triangular", 1, 3),
]


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


def timms(total: int, warmup: int, **options: object) -> list[float]:
    """Rates of timm's CosineLRScheduler at 0 <= t < total."""
    scheduler = pytest.importorskip("timm.scheduler.cosine_lr")
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    cosine = scheduler.CosineLRScheduler(optimizer, total, warmup_t=warmup, **options)
    return [cosine._get_lr(t)[0] for t in range(total)]


@pytest.mark.parametrize("by", ["step", "epoch"])
@pytest.mark.parametrize("floor", [0.0, 1e-5])
@pytest.mark.parametrize("warmup", [0, 5])
def test_cosine_with_a_warm_up_and_a_floor_is_timms(by: str, floor: float, warmup: int) -> None:
    unit = 7 if by == "step" else 1
    config: dict[str, object] = {"epochs": 20, "schedule": "cosine", "schedule_by": by, "min_lr": floor}
    if warmup:
        config |= {"warmup_epochs": warmup, "warmup_lr": 1e-6}
    want = timms(20 * unit, warmup * unit, lr_min=floor, warmup_lr_init=1e-6)
    assert rates(7, **config)[:: 7 // unit] == pytest.approx(want, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("by", ["step", "epoch"])
def test_a_prefixed_warm_up_is_torchs_linear_then_cosine(by: str) -> None:
    """torch: SequentialLR of LinearLR and CosineAnnealingLR; the whole peak is reached at its end."""
    unit = 7 if by == "step" else 1
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    parts = [
        LinearLR(optimizer, 1e-4, 1.0, total_iters=5 * unit),
        CosineAnnealingLR(optimizer, 15 * unit, eta_min=5e-6),
    ]
    scheduler, want = SequentialLR(optimizer, parts, [5 * unit]), []
    for _ in range(20 * unit):
        want.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    config: dict[str, object] = {
        "schedule_by": by,
        "warmup_epochs": 5,
        "warmup_lr": 1e-5,
        "warmup_prefix": True,
    }
    got = rates(7, epochs=20, schedule="cosine", min_lr=5e-6, **config)[:: 7 // unit]
    assert got == pytest.approx(want, rel=1e-9)
    prefixed = timms(15 * unit, 5 * unit, lr_min=5e-6, warmup_lr_init=1e-5, warmup_prefix=True)
    assert got[: 15 * unit] == pytest.approx(prefixed, rel=1e-12)


@pytest.mark.parametrize("name", ["multistep", "constant"])
def test_a_warm_up_precedes_other_schedules(name: str) -> None:
    """A hundredth of the rate at the first update."""
    plain = rates(4, epochs=8, schedule=name)
    got = rates(4, epochs=8, schedule=name, warmup_epochs=1.5)
    assert got[6:] == plain[6:]
    assert got[:6] == pytest.approx([0.001 + 0.099 * t / 6 for t in range(6)])


def test_a_shorter_run_ends_inside_of_its_schedule() -> None:
    """TRADES is made for 100 epochs, of which it trains 76."""
    for name in ("release", "multistep", "cosine", "onecycle", "triangular"):
        whole = rates(3, epochs=10, schedule=name)
        assert rates(3, epochs=6, schedule_epochs=10, schedule=name) == whole[:18]
    beyond = rates(3, epochs=8, schedule_epochs=5, schedule="cosine", min_lr=0.01)
    assert beyond[15:] == [pytest.approx(0.01)] * 9
    assert min(rates(3, epochs=8, schedule_epochs=5, schedule="triangular")) == 0


def test_by_epoch_it_runs_ahead_by_epochs() -> None:
    """IKL's release counts epochs from 1, and divides by one more than there are."""
    got = rates(3, epochs=9, schedule="cosine", schedule_by="epoch", schedule_ahead=1, schedule_epochs=10)
    want = [0.05 * (1 + math.cos(math.pi * epoch / 10)) for epoch in range(1, 10)]
    assert got[::3] == pytest.approx(want)
    assert got[2::3] == got[::3]


def test_constant() -> None:
    assert set(rates(4, epochs=3, schedule="constant")) == {0.1}


def test_a_triangle_ends_at_its_floor() -> None:
    got = rates(100, epochs=6, schedule="triangular", warmup=1 / 6, min_lr=0.01)
    want = np.interp(np.arange(600), [0, 100, 600], [0, 0.1, 0.01])
    assert got == pytest.approx(want, rel=1e-9)


def test_weak_attacks_take_the_share_of_the_epochs() -> None:
    """Against exact arithmetic: 0.55 of 100 epochs is 55.00000000000001 in floating point."""
    for epochs in (1, 30, 50, 100, 200):
        for percent in range(101):
            steps = attack_steps(AttackConfig(steps=9, early_steps=1, early_share=percent / 100), epochs)  # type: ignore[arg-type]
            early = sum(steps(epoch) == 1 for epoch in range(epochs))
            assert early == math.ceil(Fraction(percent, 100) * epochs)
