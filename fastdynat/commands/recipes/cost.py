"""Floating-point operations of a recipe, and the hours they take here and on a reference GPU."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from fastdynat.commands.bench.flops import StepFlops, count_step
from fastdynat.commands.bench.roofline import EXPECTED, REFERENCE
from fastdynat.commands.bench.stopwatch import Stopwatch
from fastdynat.commands.bench.work import matrix_product
from fastdynat.data import DatasetInfo
from fastdynat.data.split import DEFAULT_VAL_IMAGES
from fastdynat.methods import method_class
from fastdynat.methods.dyart import Dyart
from fastdynat.methods.natural import Natural, NaturalOptions
from fastdynat.models import build_model
from fastdynat.recipes import Recipe
from fastdynat.training.resolved_config import ResolvedConfig
from fastdynat.training.schedules import attack_steps, epochs_of_method
from fastdynat.tuning.devices import AMP_DTYPES

TRAINING_IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "svhn": 73_257, "mnist": 60_000}


UNITS = ((72, 24, "days"), (1, 1, "hours"), (0, 1 / 60, "minutes"))  # from so many hours on


@dataclass(frozen=True)
class RecipeCost:
    """Compute of a recipe.

    Attributes:
        per_image: FLOPs of a training step per image, the mean over the epochs.
        images: per epoch.
        epochs: with the burn-in, whose steps have no attack.
    """

    per_image: float
    images: int
    epochs: int

    @property
    def total(self) -> float:
        """FLOPs in all."""
        return self.per_image * self.images * self.epochs


@dataclass(frozen=True)
class Hours:
    """An estimate of a run's duration, from the least to the most, and the device."""

    least: float
    most: float
    where: str

    def text(self) -> str:
        """The range in hours, or in days or minutes."""
        _, unit, name = next(found for found in UNITS if self.least >= found[0])
        return f"{_two_digits(self.least / unit)} to {_two_digits(self.most / unit)} {name}"


def recipe_cost(recipe: Recipe, config: ResolvedConfig[Any], info: DatasetInfo) -> RecipeCost:
    """The compute of a run of `recipe`, counted on the meta device, without memory."""
    method = method_class(config.method)(config.options)

    def build(name: str) -> torch.nn.Module:
        with torch.device("meta"):
            return build_model(name, num_classes=info.num_classes, image_shape=info.image_shape)

    def counted(*, awp: bool = False) -> StepFlops:
        guide = build(config.model.guide) if method.uses_guide else None
        return count_step(method, build(config.model.model), guide, info.image_shape, 1, awp=awp)

    if isinstance(method, Dyart):  # its losses need the points of its search, which the count does not make
        one = count_step(Natural(NaturalOptions()), build(config.model.model), None, info.image_shape, 1)
        update = perturbed = 2 * one.update
    else:
        one = counted()
        update = perturbed = one.update + one.guide
    if config.attack.awp > 0:
        with_awp = counted(awp=True)
        perturbed = with_awp.update + with_awp.guide
    epochs, searches = epochs_of_method(config.optim), method.attacks and method.searches
    steps = attack_steps(config.attack, epochs)
    last_look = one.forward if config.attack.attack == "apgd" else 0  # at the loss of its last point
    of_epochs = [
        (perturbed if epoch >= config.attack.awp_warmup else update)
        + (steps(epoch) * one.attack_step + last_look if searches else 0)
        for epoch in range(epochs)
    ]
    whole = method.replays * sum(of_epochs) + config.optim.burn_in * 3 * one.forward
    return RecipeCost(whole / config.optim.epochs, _images(recipe, config), config.optim.epochs)


def _images(recipe: Recipe, config: ResolvedConfig[Any]) -> int:
    data = config.data
    if data.epoch_steps is not None:
        return data.epoch_steps * data.batch_size
    everything = TRAINING_IMAGES.get(data.data) if recipe.trained_on is None else recipe.trained_on.images
    assert everything is not None
    held_out = DEFAULT_VAL_IMAGES if data.val_size is None else data.val_size
    return everything - int(held_out if held_out >= 1 else held_out * everything)


def hours_here(cost: RecipeCost, config: ResolvedConfig[Any]) -> Hours:
    """The estimate for this machine: by the rate of a large matrix product, measured now, and its share that
    a training step is expected to reach (`fastdynat bench` measures both).
    """
    device, engine = torch.device(config.engine.device), config.engine
    work, flops = matrix_product(AMP_DTYPES[engine.amp] or torch.float32, device)
    watch = Stopwatch(device)
    calls = watch.calls_per_sample(0.02)
    rate = flops / min(watch.time(work.call, calls) for _ in range(10))
    key = (device.type, engine.amp != "off", engine.compile != "off")
    low, high, _ = EXPECTED.get(key, (0.1, 0.4, ""))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    precision = "float32" if engine.amp == "off" else engine.amp
    where = name if device.type == "cuda" else f"{name}, {torch.get_num_threads()} threads"
    return _hours(
        cost, rate, low, high, f"{where}, {precision}, {rate / 1e12:.3g} TFLOP/s in matrix products"
    )


def hours_on_reference(cost: RecipeCost) -> Hours:
    """The prediction for one H200 in bf16, compiled and captured."""
    low, high, _ = EXPECTED["cuda", True, True]
    return _hours(cost, REFERENCE.flops, low, high, REFERENCE.source)


def _hours(cost: RecipeCost, rate: float, low: float, high: float, where: str) -> Hours:
    return Hours(cost.total / rate / high / 3600, cost.total / rate / low / 3600, where)


def _two_digits(number: float) -> str:
    if number <= 0:
        return "0"
    digits = max(0, 1 - math.floor(math.log10(number)))
    return f"{round(number, digits):,.{min(digits, 4)}f}" if number < 100 else f"{number:,.0f}"
