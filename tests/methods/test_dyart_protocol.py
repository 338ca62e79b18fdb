"""Six updates of DyART's loop in float64: search, filter, clipping, groups, momentum, statistics, average."""

import copy
import math
from typing import Any

import pytest
import torch
from support.boundary_reference import published_filter, published_search
from support.dyart_reference import reference_step
from support.stepping import EPS, LR, K, make_batch, moved_network
from support.stepping import train_step as make_train_step
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR

from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attacks.boundary_search import BoundarySpec, boundary, boundary_start
from fastdynat.config import OptimConfig
from fastdynat.data import Batch
from fastdynat.methods import Dyart, DyartOptions
from fastdynat.training.average import AverageRule, WeightAverage
from fastdynat.training.run_average import average_rule
from fastdynat.training.schedules import momentum_at, schedule_factor
from fastdynat.training.step import TrainStep

EPOCHS, STEPS, R0, CLIP, DECAY, TAU, SHARE = 3, 2, 0.05, 0.1, 5e-2, 0.995, 1 / 3
SEARCH = 8


def confident_network() -> nn.Module:
    model = moved_network(1)
    with torch.no_grad():
        model[4].weight.mul_(6)  # type: ignore[index]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.01
    return model


class Released:
    """The loop as the release has it, with its step counter that begins one epoch below 0."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.average = model, copy.deepcopy(model)
        norms = [p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
        rest = [p for p in model.parameters() if all(p is not q for q in norms)]
        groups = [{"params": rest}, {"params": norms, "weight_decay": 0.0}]
        self.optimizer = SGD(groups, lr=LR, weight_decay=DECAY, momentum=0.9, nesterov=True)
        self.scheduler = OneCycleLR(self.optimizer, max_lr=LR, pct_start=0.7, total_steps=EPOCHS)

    def update(self, batch: Batch, start: Tensor, epoch: int, number: int) -> list[str]:
        counter = (epoch - 1) * STEPS + number
        if counter in (0, 1):
            for module in self.model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = 1.0 if counter == 0 else 0.01
        self.optimizer.zero_grad()
        spec = BoundarySpec(steps=SEARCH, eps_start=EPS)
        fates = reference_step(self.model, batch.x, batch.labels, start, spec, R0)
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self._average(counter + 1)
        return fates

    def _average(self, counter: int) -> None:
        since = counter - SHARE * EPOCHS * STEPS
        keep = min(TAU, (1 + since) / (10 + since)) * int(since >= 0)
        for mean, p in zip(self.average.parameters(), self.model.parameters(), strict=True):
            mean.data = mean.data * keep + p.data * (1 - keep)


def our_step(model: nn.Module) -> TrainStep:
    config = OptimConfig(
        lr=LR,
        epochs=EPOCHS,
        nesterov=True,
        weight_decay=DECAY,
        decay_norms=False,
        clip_grad=CLIP,
        schedule="onecycle",
        schedule_by="epoch",
        warmup=0.7,
        cycle_momentum=True,
    )
    method = Dyart(DyartOptions(r0=R0))
    made = make_train_step(method, model, None, spec=PGDSpec(EPS, 0.01, SEARCH))
    return TrainStep(
        method,
        made.networks,
        made.spec,
        config,
        made.precision,
        schedule_factor(config, STEPS),
        momentum=momentum_at(config, STEPS),
        statistics_resets={STEPS},
    )


def labels_of(model: nn.Module, batch: Batch) -> Batch:
    """All but one image as the network classifies them."""
    labels = copy.deepcopy(model).eval()(batch.x).argmax(1)
    labels[0] = (labels[0] + 1) % K
    return Batch(batch.x, labels, batch.indices)


def test_six_updates_equal_the_release() -> None:
    model = confident_network()
    released, step = Released(copy.deepcopy(model)), our_step(model)
    batch = labels_of(model, make_batch())
    # The release's counter is one epoch behind, less the one that it is ahead when the average is taken.
    rule = AverageRule(TAU, warmup=math.ceil(SHARE * EPOCHS * STEPS) + STEPS - 1)
    average = WeightAverage(model, rule, copy_buffers=True)
    fates, seen = set(), []
    for update in range(EPOCHS * STEPS):
        epoch, number = divmod(update, STEPS)
        state = torch.get_rng_state()
        start = boundary_start(batch.x, EPS)
        torch.set_rng_state(state)
        step(batch)
        average.update()
        fates |= set(released.update(batch, start, epoch, number))
        group = step.optimizers[0].param_groups[0]
        seen.append(float(group["momentum"]))
        assert seen[-1] == pytest.approx(released.optimizer.param_groups[0]["momentum"], abs=1e-12)
        assert float(group["lr"]) == pytest.approx(released.optimizer.param_groups[0]["lr"], abs=1e-12)
        for key, value in model.state_dict().items():
            torch.testing.assert_close(
                value, released.model.state_dict()[key], rtol=1e-7, atol=1e-10, msg=f"{key} {update}"
            )
        if number == STEPS - 1 and epoch + 1 < EPOCHS:
            released.scheduler.step()
    assert {"used", "not found"} <= fates, fates
    assert [round(m, 2) for m in seen] == [0.95, 0.95, 0.85, 0.85, 0.95, 0.95]
    for p, q in zip(average.module.parameters(), released.average.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-10)
    assert not torch.equal(average.module[0].weight, model[0].weight)  # type: ignore[index]


def test_the_averages_first_update_is_the_recipes() -> None:
    """The release's 2.5 % of 200 epochs, plus its counter's delay: update 1,175 of 39,200."""
    config = OptimConfig(epochs=211, burn_in=11, ema=TAU, ema_warmup=0.02997)
    assert average_rule(config, 200, 196).warmup == 0.025 * 200 * 196 + 196 - 1 == 1175


def test_the_filter_drops_what_the_releases_drops_on_a_linear_network() -> None:
    """On most images all pixels move equally far: the share of flat ones among the others is 0 / 0."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).double()
    x = torch.rand(24, 3, 4, 4, dtype=torch.float64)
    y = net(x).argmax(1)
    generator = torch.Generator().manual_seed(2)
    start = boundary_start(x, 8 / 255, generator=generator)
    spec = BoundarySpec()
    got: Any = boundary(net, x, y, spec, x_start=start)
    want, without = [], boundary(net, x, y, BoundarySpec(flat_pixel_test=False), x_start=start).usable
    for i in range(24):
        point, _ = published_search(net, x[i], int(y[i]), start[i], spec)
        want.append(published_filter(net, x[i], int(y[i]), point, spec.temperature))
    assert got.found.all()
    assert got.usable.tolist() == want
    assert 0 < sum(want) < int(without.sum()) == 24
