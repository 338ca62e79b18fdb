"""Each recipe's release per epoch and per batch, written down from its code, without ours.

Rates and momenta are functions (epoch, step in the epoch, steps per epoch), all from 0, of the epochs of the
method.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR

Rates = Callable[[int, int, int], tuple[float, float]]  # -> (learning rate, momentum)
OLD_RED = 0.2471  # what the lineage of davidcpage/cifar10-fast divides red by


@dataclass(frozen=True, kw_only=True)
class Release:
    """One release's protocol.

    Attributes:
        epochs: of the method, without a burn-in.
        batch: images per update.
        steps: updates per epoch with the images that the recipe trains on. Where the release trains on all
            50,000 CIFAR images, it makes 391 of 128, and ours 383 with 1,000 of them held out.
        rates: rate and momentum of an update.
        decay: weight decay of convolutions and linear layers, and of what normalisation layers learn.
        passes: passes of the model in train mode per batch, each of which moves its running statistics.
        attack: (eps, step size, steps); where the search is FAB, (where it starts, None, iterations).
        start: the attack's first point: "uniform" in the ball, "gaussian", 0.001 N(0, 1) from the image, the
            image itself ("none"), or the method's own ("own"), whose tests compare it.
        raw_shortcut: projection shortcuts of the pre-activation network read a block's input, not what batch
            norm and ReLU make of it; None for other networks, or where the release's file is not known.
        reflect: crops are of reflected images, else of zero-padded ones.
        red: what the red channel is divided by inside the network; 1 where images are not normalised.
        average: number of the first update, from 0, that does not copy the weights into the average; None
            without an average.
        awp: (gamma, first epoch, from 0); None without.
        burn_in: (epochs, rate) of natural training before; None without.
        reset: epoch, from 0, at whose first step batch norm has momentum 1; None without.
    """

    epochs: int
    batch: int = 128
    steps: int = 383
    rates: Rates
    decay: tuple[float, float]
    nesterov: bool = False
    clip: float = 0.0
    passes: int
    attack: tuple[float, float | None, int]
    start: str
    raw_shortcut: bool | None = None
    reflect: bool = False
    red: float = 1.0
    average: int | None = None
    awp: tuple[float, int] | None = None
    burn_in: tuple[int, float] | None = None
    reset: int | None = None


def by_epoch(lr: float, drops: dict[int, float], first: float | None = None) -> Rates:
    """`lr` times the factor of the last of `drops`, by epoch; `first`: the rate of epoch 0."""

    def rates(epoch: int, step: int, steps: int) -> tuple[float, float]:
        if first is not None and epoch == 0:
            return first, 0.9
        return lr * min([1.0, *(factor for start, factor in drops.items() if epoch >= start)]), 0.9

    return rates


def by_time(lr: float, drops: dict[float, float]) -> Rates:
    """The same by t = epoch + (step + 1) / steps, as Rice et al. compute the rate before each update."""

    def rates(epoch: int, step: int, steps: int) -> tuple[float, float]:
        t = epoch + (step + 1) / steps
        return lr * min([1.0, *(factor for start, factor in drops.items() if t >= start)]), 0.9

    return rates


@cache
def stepped(name: str, lr: float, total: int, share: float) -> tuple[list[float], list[float]]:
    """Rate and momentum after each `step` of torch's scheduler as releases make it: with cycled momentum."""
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)
    if name == "onecycle":
        scheduler: LRScheduler = OneCycleLR(optimizer, max_lr=lr, pct_start=share, total_steps=total)
    else:
        scheduler = CyclicLR(
            optimizer, base_lr=0.0, max_lr=lr, step_size_up=total / 2, step_size_down=total / 2
        )
    seen: tuple[list[float], list[float]] = [], []
    for _ in range(total):
        for values, key in zip(seen, ("lr", "momentum"), strict=True):
            values.append(optimizer.param_groups[0][key])
        optimizer.step()
        scheduler.step()
    return seen


def each_update(name: str, lr: float, epochs: int, share: float = 0.5) -> Rates:
    def rates(epoch: int, step: int, steps: int) -> tuple[float, float]:
        values = stepped(name, lr, epochs * steps, share)
        return values[0][epoch * steps + step], values[1][epoch * steps + step]

    return rates


def cosinew(lr: float, epochs: int) -> Rates:
    """DyART's schedule: OneCycleLR over the epochs, stepped at the end of each."""

    def rates(epoch: int, step: int, steps: int) -> tuple[float, float]:
        values = stepped("onecycle", lr, epochs, 0.025)
        return values[0][epoch], values[1][epoch]

    return rates


def average_start(epochs: int, counted: int, made: int) -> int:
    """The first update, from 0, at which DyART's step counter reaches 2.5 % of the steps that it counts on.

    The counter is (epoch - 1) * `counted` + step + 1 when the average is taken, with epochs from 0 and `made`
    steps in each.
    """
    return next(
        u
        for u in range(epochs * made)
        if (u // made - 1) * counted + u % made + 1 >= 0.025 * epochs * counted
    )


EIGHT, TWO, SIXTEENTH = 8 / 255, 2 / 255, 0.031
PUBLISHED = (SIXTEENTH, 0.007, 10)
OURS = (EIGHT, TWO, 10)
DYNAT = by_epoch(0.1, {75: 0.1, 90: 0.01, 100: 0.001}, first=0.02)
RICE = by_time(0.1, {100: 0.1, 150: 0.01})

RELEASES = {
    "ard": Release(
        epochs=200,
        rates=by_epoch(0.1, {100: 0.1}),
        decay=(2e-4, 2e-4),
        passes=12,
        attack=OURS,
        start="uniform",
    ),
    "at-awp": Release(
        epochs=200,
        rates=RICE,
        decay=(5e-4, 5e-4),
        passes=13,
        attack=OURS,
        start="uniform",
        raw_shortcut=False,
        reflect=True,
        red=OLD_RED,
        awp=(0.01, 0),
    ),
    "dyart-cifar10": Release(
        epochs=200,
        batch=256,
        steps=math.ceil(50_000 / 256),  # of the whole training set, although 48,976 images are left
        rates=cosinew(0.1, 200),
        decay=(5e-4, 0.0),
        nesterov=True,
        clip=0.1,
        passes=2,
        attack=(EIGHT, None, 20),
        start="own",
        red=OLD_RED,
        average=average_start(200, 196, 196),
        burn_in=(11, 0.1),
        reset=1,
    ),
    "dyart-cifar10-gn": Release(
        epochs=100,
        batch=256,
        steps=math.ceil(50_000 / 256),
        rates=by_epoch(0.1, {50: 0.1, 75: 0.01}),
        decay=(5e-4, 0.0),
        nesterov=True,
        passes=2,
        attack=(EIGHT, None, 20),
        start="own",
        red=OLD_RED,
        average=average_start(100, 196, 196),
        burn_in=(11, 0.1),
    ),
    "dyart-tiny-imagenet": Release(
        epochs=100,
        batch=256,
        steps=math.ceil(90_000 / 256),
        rates=cosinew(0.1, 100),
        decay=(5e-4, 5e-4),
        nesterov=True,
        clip=1.0,
        passes=2,
        attack=(EIGHT, None, 20),
        start="own",
        average=average_start(100, 391, 352),
        burn_in=(21, 0.1),
        reset=1,
    ),
    "dyart-tiny-imagenet-gn": Release(
        epochs=100,
        batch=256,
        steps=math.ceil(90_000 / 256),
        rates=cosinew(0.05, 100),
        decay=(5e-4, 5e-4),
        nesterov=True,
        passes=2,
        attack=(EIGHT, None, 20),
        start="own",
        average=average_start(100, 391, 352),
        burn_in=(21, 0.1),
    ),
    "dynat": Release(
        epochs=100, rates=DYNAT, decay=(2e-4, 2e-4), passes=2, attack=PUBLISHED, start="gaussian"
    ),
    "dynat-awp": Release(
        epochs=100,
        rates=DYNAT,
        decay=(2e-4, 2e-4),
        passes=2,
        attack=PUBLISHED,
        start="gaussian",
        awp=(0.005, 9),
    ),
    "fast2020": Release(
        epochs=15,
        rates=each_update("triangular", 0.2, 15),
        decay=(5e-4, 5e-4),
        passes=2,
        attack=(EIGHT, 10 / 255, 1),
        start="uniform",
        raw_shortcut=True,
        red=OLD_RED,
    ),
    "free2019": Release(
        epochs=10,
        rates=each_update("triangular", 0.04, 10),
        decay=(5e-4, 5e-4),
        passes=8,
        attack=(EIGHT, EIGHT, 1),
        start="own",
        raw_shortcut=True,
        red=OLD_RED,
    ),
    "gairat": Release(
        epochs=100,
        rates=by_epoch(0.1, {29: 0.1, 59: 0.01}),
        decay=(2e-4, 2e-4),
        passes=1,
        attack=PUBLISHED,
        start="uniform",
    ),
    "hat": Release(
        epochs=50,
        rates=each_update("onecycle", 0.21, 50, 0.25),
        decay=(5e-4, 5e-4),
        nesterov=True,
        passes=3,
        attack=OURS,
        start="gaussian",
    ),
    "lbgat": Release(
        epochs=100, rates=DYNAT, decay=(2e-4, 2e-4), passes=2, attack=PUBLISHED, start="gaussian"
    ),
    "lbgat6": Release(
        epochs=100, rates=DYNAT, decay=(2e-4, 2e-4), passes=2, attack=PUBLISHED, start="gaussian"
    ),
    "mail": Release(
        epochs=120,
        rates=by_epoch(0.01, {75: 0.1, 90: 0.01, 100: 0.001}),
        decay=(3.5e-3, 3.5e-3),
        passes=1,
        attack=PUBLISHED,
        start="gaussian",
    ),
    "mart": Release(
        epochs=120,
        rates=by_epoch(0.01, {74: 0.1, 89: 0.01, 99: 0.001}),
        decay=(3.5e-3, 3.5e-3),
        passes=2,
        attack=PUBLISHED,
        start="gaussian",
    ),
    "nfgsm2022": Release(
        epochs=30,
        rates=each_update("triangular", 0.2, 30),
        decay=(5e-4, 5e-4),
        passes=2,
        attack=(EIGHT, EIGHT, 1),
        start="own",
        raw_shortcut=True,
        red=OLD_RED,
    ),
    "pang2021": Release(
        epochs=110,
        rates=by_time(0.1, {100: 0.1, 105: 0.01}),
        decay=(5e-4, 5e-4),
        passes=3,
        attack=OURS,
        start="uniform",
        reflect=True,
        red=OLD_RED,
    ),
    "rice2020": Release(
        epochs=200,
        rates=RICE,
        decay=(5e-4, 5e-4),
        passes=13,
        attack=OURS,
        start="uniform",
        raw_shortcut=False,
        reflect=True,
        red=OLD_RED,
    ),
    "rslad": Release(
        epochs=300,
        rates=by_epoch(0.1, {215: 0.1, 260: 0.01, 285: 0.001}),
        decay=(2e-4, 2e-4),
        passes=2,
        attack=OURS,
        start="gaussian",
    ),
    "trades": Release(
        epochs=76,
        rates=by_epoch(0.1, {74: 0.1}),
        decay=(2e-4, 2e-4),
        passes=3,
        attack=PUBLISHED,
        start="gaussian",
    ),
}
