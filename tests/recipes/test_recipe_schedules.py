"""Rate, momentum, average, radius, start and shortcuts of every recipe, against its release's own formula."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.published_schedules import Published, published
from torch import nn
from torch.optim import SGD

from fastdynat.config import TrainConfig, override
from fastdynat.config.optimizer_kinds import OPTIMIZER_KINDS
from fastdynat.config.train_checks import check_train_config
from fastdynat.data import DatasetInfo, dataset_info
from fastdynat.methods import method_class
from fastdynat.methods.configs import default_config
from fastdynat.models import build_model
from fastdynat.recipes import read_recipe, recipe_names
from fastdynat.training.attack_ramps import attack_sizes
from fastdynat.training.networks import pixel_statistics
from fastdynat.training.resolve_attack import resolved_attack
from fastdynat.training.resolve_optim import resolved_optim
from fastdynat.training.resolved_config import ResolvedOptim
from fastdynat.training.run_average import average_rule, averages_every
from fastdynat.training.schedules import epochs_of_method, momentum_at, schedule_factor

TABLE = published()
# They start where their papers do, which their tests compare, whatever `start` says.
OWN_START = {"dyart", "fgsm_pgi", "free", "liet", "n_fgsm", "nu_at"}
FOLDER = DatasetInfo(
    "imagefolder", 1000, (3, 224, 224), tuple(map(str, range(1000))), None, None, "crop-flip"
)


def configured(name: str) -> tuple[TrainConfig[Any], ResolvedOptim]:
    values = read_recipe(name).values
    config = override(default_config(values["method"]), values, name)
    check_train_config(config)
    return config, resolved_optim(config, dataset_info(config.data.data) or FOLDER)


def updates(release: Published) -> list[int]:
    """The first, a middle and the last update of every epoch, or of every 10th of a thousand and more."""
    stride = 1 if release.epochs < 1000 else 10
    epochs = range(0, release.epochs, stride)
    return sorted(
        {
            epoch * release.steps + step
            for epoch in epochs
            for step in (0, release.steps // 2, release.steps - 1)
        }
    )


def test_every_recipe_is_in_the_table() -> None:
    """A new recipe needs its release's formulas in support.published_schedules."""
    assert not set(recipe_names()) - TABLE.keys()


@pytest.fixture(params=recipe_names())
def recipe(request: pytest.FixtureRequest) -> tuple[TrainConfig[Any], ResolvedOptim, Published]:
    return *configured(request.param), TABLE[request.param]


Recipe = tuple[TrainConfig[Any], ResolvedOptim, Published]


def test_rate_and_momentum_by_epoch(recipe: Recipe) -> None:
    _, optim, release = recipe
    assert epochs_of_method(optim) == release.epochs
    begin, peak = optim.burn_in * release.steps, optim.lr
    factor, momentum = schedule_factor(optim, release.steps), momentum_at(optim, release.steps)
    for update in updates(release):
        allowed = max(release.apart, 1e-9) * peak
        assert peak * factor(begin + update) == pytest.approx(release.rate(update), rel=1e-9, abs=allowed)
        if optim.opt == "sgd":
            assert momentum(begin + update) == pytest.approx(release.momentum(update), abs=1e-9), update


def test_decay_of_the_average_by_epoch(recipe: Recipe) -> None:
    _, optim, release = recipe
    assert (optim.ema > 0 or optim.swa) == (release.keep is not None)
    if release.keep is None:
        return
    assert averages_every(optim) == release.every
    assert optim.ema_buffers == release.buffers
    rule = average_rule(optim, release.epochs, release.steps)
    each = 1 if release.every == "epoch" else release.steps
    counted = range(release.epochs) if each == 1 else [*range(20), *updates(release)]
    for update in counted:
        assert rule.keep_rate(update) == pytest.approx(release.keep(update), abs=1e-12), update
    begin = next(update for update in range(release.epochs * each) if release.keep(update) > 0)
    assert [rule.keep_rate(begin + d) > 0 for d in (-1, 0)] == [False, True]


def test_radius_and_step_size_by_epoch(recipe: Recipe) -> None:
    config, optim, release = recipe
    info, method = dataset_info(config.data.data) or FOLDER, method_class(config.method)(config.options)
    attack = resolved_attack(config.attack, info, method, [])
    eps, step_size = release.sizes
    assert attack.eps == pytest.approx(eps, rel=1e-12)
    assert step_size is None or attack.step_size == pytest.approx(step_size, rel=2e-4)
    sizes = attack_sizes(attack, optim, release.steps)
    assert (sizes is None) == (release.by_epoch is None)
    if sizes is None or release.by_epoch is None:
        return
    for update in updates(release):
        want = release.by_epoch(update // release.steps)
        assert sizes(optim.burn_in * release.steps + update) == pytest.approx(want, rel=2e-4), update


def test_where_the_attack_starts(recipe: Recipe) -> None:
    config, _, release = recipe
    info, method = dataset_info(config.data.data) or FOLDER, method_class(config.method)(config.options)
    starts = {spec.start for spec in resolved_attack(config.attack, info, method, []).specs()}
    if release.start == "own":
        assert config.method in OWN_START
    else:
        assert config.method not in OWN_START
        assert starts == {release.start}


def test_what_images_are_normalised_by(recipe: Recipe) -> None:
    config, _, release = recipe
    given = dataset_info(config.data.data) or replace(FOLDER, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    found = pixel_statistics(config.model, given)
    assert found == ((None, None) if release.pixels is None else release.pixels)


@torch.no_grad()
def test_what_projection_shortcuts_read(recipe: Recipe) -> None:
    """Whether it is the very tensor that the block reads; the weights would fit the other network, too."""
    config, _, release = recipe
    if release.raw_shortcut is None:
        return
    raw, read = [], {}
    with torch.device("meta"):
        model = build_model(config.model.model, num_classes=10, image_shape=(3, 32, 32))
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda _, inputs, name=name: read.update({name: inputs[0]}))
        model(torch.empty(2, 3, 32, 32))
    for name in [name for name in read if name.endswith(".shortcut")]:
        raw.append(read[name] is read[name.removesuffix(".shortcut")])
    assert raw == [release.raw_shortcut] * 3


def test_optimiser_and_what_has_no_weight_decay(recipe: Recipe) -> None:
    _, optim, release = recipe
    assert optim.opt == release.opt
    assert optim.opt_betas == (release.betas or OPTIMIZER_KINDS[release.opt].betas)
    assert set(optim.decay_exempt) == set(release.exempt)
    if release.opt == "sgd":
        assert optim.decay_norms == release.norms


def test_the_rates_of_ares_are_timms() -> None:
    """Its scheduler, stepped at every update."""
    scheduler = pytest.importorskip("timm.scheduler")
    release = TABLE["liu2023-swin"]
    optimizer = SGD(nn.Linear(1, 1).parameters(), lr=2.5e-4)
    cosine, _ = scheduler.create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=300,
        min_lr=1e-5,
        warmup_lr=1e-6,
        warmup_epochs=5,
        cooldown_epochs=0,
        step_on_epochs=False,
        updates_per_epoch=release.steps,
    )
    for update in [*range(0, 300 * release.steps, 5003), 300 * release.steps - 1]:
        cosine.step_update(update)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(release.rate(update), rel=1e-12)
