"""Each recipe's training objects per epoch and per batch, against the tables of `releases`.

Images are 8x8 and networks are narrow; number of images, configuration, loader, step, optimiser and average
are the recipe's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.published_schedules import published
from support.releases import RELEASES, Release
from torch import Tensor, nn

from fastdynat.config import TrainConfig, override, to_yaml
from fastdynat.data import Batch, DatasetInfo, TrainLoader, TrainSplit, dataset_info
from fastdynat.data.image_sets import ImageSource
from fastdynat.data.split import stratified_split
from fastdynat.methods import method_class
from fastdynat.methods.configs import default_config
from fastdynat.models import build_model, resnet
from fastdynat.recipes import read_recipe, recipe_names
from fastdynat.runs import RunDir
from fastdynat.runs.weights import Sidecar, save_weights
from fastdynat.training import build_parts
from fastdynat.training.norm_layers import is_norm
from fastdynat.training.parts import burn_in_step
from fastdynat.training.resolve import resolve, resolve_loader
from fastdynat.training.step import TrainStep
from fastdynat.training.trainer import Trainer
from fastdynat.training.weight_files import describe_weights

SIDE, BATCH = 8, 16
OURS = {"fast", "dynat-256", "dynat-512"}  # no published protocol
FOLDER = DatasetInfo(
    "imagefolder", 200, (3, SIDE, SIDE), tuple(map(str, range(200))), (0.5,) * 3, (0.25,) * 3, "crop-flip"
)


@dataclass
class Built:
    """The training objects of one recipe."""

    config: TrainConfig[Any]
    info: DatasetInfo
    loader: TrainLoader
    images: Tensor
    step: TrainStep
    trainer: Trainer
    burn_in: TrainStep | None

    def model(self) -> nn.Module:
        return self.step.networks.raw["model"]


def narrow(name: str) -> str:
    """A small network of the same kind: widths are patched, depths are in the name."""
    return name.replace("wrn-28-10", "wrn-10-1").replace("wrn-34-10", "wrn-10-1")


def teacher(config: TrainConfig[Any], info: DatasetInfo, folder: Path) -> str:
    """Weights of a guide, random, where --guide-from takes them."""
    network = build_model("resnet18", num_classes=info.num_classes, image_shape=info.image_shape)
    common: dict[str, Any] = {
        "dataset": info.name,
        "class_names": info.class_names,
        "method": "natural",
        "norm": "linf",
    }
    common |= {
        "mean": None,
        "std": None,
        "val_clean_acc": None,
        "val_pgd10_acc": None,
        "eps": 0.0,
        "eval_eps": 0.0,
        "epoch": 1,
    }
    sidecar = Sidecar(
        architecture="resnet18",
        num_classes=info.num_classes,
        image_shape=info.image_shape,
        role="model",
        **common,
    )
    save_weights(folder / "guide.safetensors", network.state_dict(), sidecar)
    return str(folder / "guide.safetensors")


def build(name: str, folder: Path) -> Built:
    values = read_recipe(name).values
    config = override(default_config(values["method"]), values, name)
    known = dataset_info(config.data.data)
    info = FOLDER if known is None else replace(known, image_shape=(3, SIDE, SIDE))
    method = method_class(config.method)
    guide = {"guide": narrow(config.model.guide)}
    if method.uses_guide and "guide" not in method.trains:
        guide = {"guide_from": teacher(config, info, folder)}
    config = replace(
        config,
        model=replace(config.model, model=narrow(config.model.model), **guide),
        run=replace(config.run, run_dir=str(folder / "run"), quiet=True),
        engine=replace(config.engine, device="cpu"),
    )
    config = resolve(config, info, announce=False)
    count = 100_000 if known is None else 50_000
    images = torch.randint(
        256, (count, *info.image_shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    labels = torch.arange(count) % info.num_classes
    size = config.data.val_size
    train, val = stratified_split(labels, val_size=None if size is None else int(size), limit=None, seed=1)
    split = TrainSplit(info, ImageSource(labels, lambda at: images[at]), train, val)
    config = resolve_loader(config, split, announce=False)
    parts = build_parts(config, split)
    burn_in = burn_in_step(config, parts.step)
    run = RunDir.create(folder / "run", to_yaml(config), overwrite=False)
    try:
        trainer = Trainer(config, info, split.val_images(), parts, run, burn_in)
    finally:
        run.close()
    return Built(config, info, parts.loader, images[train], parts.step, trainer, burn_in)


@pytest.fixture(scope="module", params=sorted(RELEASES))
def recipe(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Built, Release]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resnet, "WIDTHS", (8, 8, 16, 16))
        yield build(request.param, tmp_path_factory.mktemp(request.param)), RELEASES[request.param]


def test_every_published_recipe_has_a_table() -> None:
    """Here, or those that need other data or much memory in test_recipe_schedules."""
    assert RELEASES.keys() | OURS <= set(recipe_names()) <= RELEASES.keys() | OURS | published().keys()


def test_epochs_batches_and_attack(recipe: tuple[Built, Release]) -> None:
    built, release = recipe
    optim, data, attack = built.config.optim, built.config.data, built.config.attack
    assert (optim.epochs, optim.burn_in) == (
        release.epochs + (release.burn_in or (0, 0))[0],
        (release.burn_in or (0, 0))[0],
    )
    assert (data.batch_size, built.loader.steps_per_epoch) == (release.batch, release.steps)
    eps, step_size, steps = release.attack
    assert attack.eps == pytest.approx(eps)
    assert step_size is None or attack.step_size == pytest.approx(step_size)
    assert attack.steps == steps


def chosen_updates(release: Release) -> list[int]:
    """The updates on both sides of every epoch's end, and some between."""
    total = release.epochs * release.steps
    ends = {e * release.steps + d for e in range(release.epochs) for d in (-2, -1, 0, 1)}
    return sorted(u for u in ends | set(range(0, total, 61)) | {total - 1} if 0 <= u < total)


def test_rate_and_momentum_of_every_epoch(recipe: tuple[Built, Release]) -> None:
    built, release = recipe
    begin = built.config.optim.burn_in * release.steps
    momentum = built.step.rates.momentum_at or (lambda update: built.config.optim.momentum)
    for update_number in chosen_updates(release):
        want = release.rates(*divmod(update_number, release.steps), release.steps)
        got = built.step.learning_rate(begin + update_number), momentum(begin + update_number)
        assert got == pytest.approx(want, abs=1e-9), update_number
    if release.burn_in is not None:
        assert built.burn_in is not None
        for update_number in (0, begin - 1):
            assert built.burn_in.learning_rate(update_number) == pytest.approx(release.burn_in[1])


def small_batch(built: Built) -> Batch:
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(BATCH, *built.info.image_shape, generator=generator)
    return Batch(x, torch.randint(built.info.num_classes, (BATCH,), generator=generator), torch.arange(BATCH))


@contextmanager
def counted(step: TrainStep) -> Iterator[list[bool]]:
    """Collects one entry per perturbation of the weights within it."""
    seen: list[bool] = []
    if step.awp is None:
        yield seen
        return
    around = step.awp.around

    def watched(*arguments: Any) -> Any:
        seen.append(True)
        return around(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step.awp, "around", watched)
        yield seen


def updates_with_edges(built: Built, release: Release) -> list[int]:
    """An update of the first epoch, and those on both sides of where weight perturbation begins."""
    first = 0 if release.awp is None else release.awp[1]
    return sorted({1, max(1, first * release.steps - 1), first * release.steps + 1})


def test_an_update_as_it_is_made(recipe: tuple[Built, Release]) -> None:
    """The optimiser's parameters, the weights that are perturbed, and the passes that move the statistics."""
    built, release = recipe
    step, begin = built.step, built.config.optim.burn_in * release.steps
    counters = [b for n, b in built.model().named_buffers() if n.endswith("num_batches_tracked")]
    norms = {id(p) for m in built.model().modules() if is_norm(m) for p in m.parameters(recurse=False)}
    assert norms
    for update_number in updates_with_edges(built, release):
        epoch = update_number // release.steps
        step.start_epoch(epoch)
        step.global_step = begin + update_number
        before = [int(c) for c in counters]
        with counted(step) as perturbed:
            step(small_batch(built))
        assert [int(c) - b for c, b in zip(counters, before, strict=True)] == [release.passes] * len(counters)
        assert len(perturbed) == (1 if release.awp is not None and epoch >= release.awp[1] else 0)
        want = release.rates(*divmod(update_number, release.steps), release.steps)
        for group in (group for optimizer in step.optimizers for group in optimizer.param_groups):
            assert (float(group["lr"]), float(group["momentum"])) == pytest.approx(want, abs=1e-9)
            assert group["nesterov"] == release.nesterov
    decays = {id(p): g["weight_decay"] for o in step.optimizers for g in o.param_groups for p in g["params"]}
    for p in built.model().parameters():
        assert decays[id(p)] == pytest.approx(release.decay[id(p) in norms])
    assert built.config.optim.clip_grad == release.clip
    assert (None if step.awp is None else step.awp.gamma) == (None if release.awp is None else release.awp[0])


def test_crops_are_padded_as_the_releases(recipe: tuple[Built, Release]) -> None:
    """The first two batches, recomputed with numpy from the stored images and the loader's own draws."""
    built, release = recipe
    loader: Any = built.loader
    plan = loader._plan(0)
    reach = [(0, 0), (4, 4), (4, 4)]
    for step, batch in zip(range(2), loader.epoch(0), strict=False):
        for row in range(0, len(batch.labels), 17):
            position = step * release.batch + row
            image = built.images[int(batch.indices[row])].numpy()
            padded = np.pad(image, reach, mode="reflect" if release.reflect else "constant")
            top, left = (int(s) for s in plan.shifts[:, position])
            crop = padded[:, top : top + SIDE, left : left + SIDE]
            want = crop[:, :, ::-1] if bool(plan.flips[position]) else crop
            assert np.array_equal(np.rint(batch.x[row].numpy() * 255), want)


def test_images_are_normalised_inside_by_the_releases_numbers(recipe: tuple[Built, Release]) -> None:
    built, release = recipe
    state = built.model().state_dict()
    assert float(state["normalize.std"].flatten()[0]) == pytest.approx(release.red, abs=1e-7)
    if release.red != 1:
        assert state["normalize.mean"].flatten().tolist() == pytest.approx([0.4914, 0.4822, 0.4465])
        assert state["normalize.std"].flatten().tolist() == pytest.approx([0.2471, 0.2435, 0.2616])
        model, info = built.config.model.model, built.trainer.info
        sidecar = describe_weights(
            built.config, info, role="model", architecture=model, epoch=0, validated={}
        )
        assert sidecar.std == pytest.approx((0.2471, 0.2435, 0.2616))
    else:
        assert state["normalize.mean"].flatten().tolist() == [0.0] * 3


def test_where_the_average_begins(recipe: tuple[Built, Release]) -> None:
    built, release = recipe
    average = built.step.networks.ema
    if release.average is None:
        assert average is None
        return
    assert average is not None
    built.trainer._begin_method()
    kept = {}
    for number in (0, release.average - 1, release.average, release.average + 10_000):
        average.updates = number
        kept[number] = average.keep_rate()
    assert [*kept.values()] == pytest.approx([0.0, 0.0, 0.1, 0.995])


def test_where_running_statistics_are_replaced(recipe: tuple[Built, Release]) -> None:
    """At the first step of the release's epoch, in the burn-in and after it."""
    built, release = recipe
    burn_in = (release.burn_in or (0, 0))[0]
    epochs = set() if release.reset is None else {release.reset, burn_in + release.reset}
    assert built.step.statistics_resets == {release.steps * epoch for epoch in epochs}
    if built.burn_in is not None:
        assert built.burn_in.statistics_resets == built.step.statistics_resets
        assert built.burn_in.optim.clip_grad == 0


def test_dyarts_counter_begins_an_epoch_below_zero() -> None:
    """The numbers that the release's counter gives, by hand: 0.025 * 200 * 196 = 980 steps, and 195 more."""
    assert RELEASES["dyart-cifar10"].average == 980 + 195 == 1175
    assert RELEASES["dyart-cifar10-gn"].average == 490 + 195
    assert RELEASES["dyart-tiny-imagenet"].average == 3 * 352 + 195
