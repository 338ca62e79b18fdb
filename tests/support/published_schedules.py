"""Rate, momentum, weight average, exemptions from weight decay, attack and pixels of each recipe's release.

Written down from the releases' code, with torch's and timm's schedulers where the releases use them, and
without ours. Updates count from 0 at the first one of the method; so do epochs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from support.releases import EIGHT, OLD_RED, PUBLISHED, RELEASES, TWO, Release, by_epoch, stepped
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR

Number = Callable[[int], float]
Pixels = tuple[tuple[float, ...], tuple[float, ...]]
IMAGENET = 1_281_167
IMAGENET_PIXELS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_PIXELS = (0.4914, 0.4822, 0.4465), (OLD_RED, 0.2435, 0.2616)
SINGH_EXEMPT = {"singh2023-convnext-t": ("biases",), "singh2023-vit-s": ("1d",)}


@dataclass(frozen=True, kw_only=True)
class Published:
    """One release.

    Attributes:
        steps: updates per epoch.
        epochs: of the method, without a burn-in.
        rate, momentum: of an update.
        keep: the share that the average keeps at its update; None without an average.
        every: what an update of the average follows.
        buffers: running statistics of the average.
        opt, betas: the optimiser; betas None is torch's default.
        exempt: further parameters without weight decay.
        norms: normalisation layers have weight decay.
        apart: how far, as a share of the peak rate, ours may be from the release's, which interpolates.
        sizes: (eps, step size) of the attack; the step size is None where it is the attack's own.
        by_epoch: the same of an epoch; None where they do not change.
        start, raw_shortcut: as in `Release`.
        pixels: (mean, standard deviation) that images are normalised by inside the network; None without.
    """

    steps: int
    epochs: int
    rate: Number
    start: str
    sizes: tuple[float, float | None]
    momentum: Number = lambda update: 0.9
    keep: Number | None = None
    every: str = "step"
    buffers: str = "average"
    opt: str = "sgd"
    betas: tuple[float, float] | None = None
    exempt: tuple[str, ...] = ()
    norms: bool = True
    apart: float = 0.0
    by_epoch: Callable[[int], tuple[float, float]] | None = None
    raw_shortcut: bool | None = None
    pixels: Pixels | None = None


def constant_decay(decay: float) -> Number:
    """The first update copies: its model is the average's beginning."""
    return lambda update: decay if update else 0.0


def ramp(begin: float, decay: float = 0.995) -> Number:
    """Gowal et al.'s, whose counter is `update` + 1 when the average is taken, and need not be whole at the
    beginning: min(decay, (1 + d) / (10 + d)) from d = 0 on, d rounded down."""

    def keep(update: int) -> float:
        delta = math.floor(update + 1 - begin)
        return min(decay, (1 + delta) / (10 + delta)) if update + 1 >= begin else 0.0

    return keep


def of_epochs(values: list[float], steps: int) -> Number:
    return lambda update: values[update // steps]


def gowals(lr: float, epochs: int, steps: int, **more: Any) -> Published:
    """The trainer of Gowal et al.'s reimplementation, which Wang, Rade and Bartoldson et al. use."""
    rates, momenta = stepped("onecycle", lr, epochs, 0.025)
    return Published(
        steps=steps,
        epochs=epochs,
        rate=of_epochs(rates, steps),
        start="uniform",
        sizes=(EIGHT, TWO),
        momentum=of_epochs(momenta, steps),
        keep=ramp(0.025 * epochs * steps),
        buffers="copy",
        norms=False,
        pixels=CIFAR_PIXELS,
        **more,
    )


def updates_of(batch: int) -> int:
    """Its number of updates per epoch, of CIFAR's whole training set."""
    return math.floor(50_000 / batch) + 1


def fast_at(steps: int, start: str, step_size: float = EIGHT) -> Published:
    """FastAT_Benchmark: OneCycleLR with torch's defaults over the epochs."""
    rates, momenta = stepped("onecycle", 0.1, 100, 0.3)
    rate, momentum = of_epochs(rates, steps), of_epochs(momenta, steps)
    return Published(
        steps=steps,
        epochs=100,
        rate=rate,
        start=start,
        sizes=(EIGHT, step_size),
        momentum=momentum,
        keep=constant_decay(0.9995),
    )


def ikl(steps: int) -> Published:
    """Cui et al.: epochs from 1, a cosine over one more than there are, the radius in the same share."""
    epochs = 200
    rates = [0.2 * 0.5 * (1 + math.cos(math.pi * epoch / (epochs + 1))) for epoch in range(1, epochs + 1)]

    def sizes(epoch: int) -> tuple[float, float]:
        eps = 8 / 255 * (epoch + 1) / epochs
        return eps, eps / 2

    return Published(
        steps=steps,
        epochs=epochs,
        rate=of_epochs(rates, steps),
        start="gaussian",
        sizes=(EIGHT, EIGHT / 2),
        keep=constant_decay(0.9),
        every="epoch",
        by_epoch=sizes,
    )


def singh(name: str) -> Published:
    """revisiting-at: epoch values of a prefixed cosine, linear between them; ModelEmaV2."""
    lr, epochs, peak, steps = 1e-3, 300, 20, IMAGENET // 640

    def at(epoch: float) -> float:
        if epoch <= peak:
            return float(np.interp(epoch, [0, peak], [1e-4 * lr, lr]))
        floor = 1e-10
        return floor + 0.5 * (lr - floor) * (1 + math.cos(math.pi * (epoch - peak) / (epochs - peak)))

    def rate(update: int) -> float:
        epoch, step = divmod(update, steps)
        return float(np.interp(step, [0, steps], [at(epoch), at(epoch + 1)]))

    return Published(
        steps=steps,
        epochs=epochs,
        rate=rate,
        start="none",
        sizes=(4 / 255, None),
        keep=constant_decay(0.9999),
        opt="adamw",
        betas=(0.9, 0.95),
        exempt=SINGH_EXEMPT[name],
        apart=1e-5,
    )


def ares(epochs: int = 300, batch: int = 256) -> Published:
    """ARES: timm's cosine and groups; 5e-4 per 512 images; the attack's step rises over five epochs."""
    steps, peak = IMAGENET // batch, 5e-4 * batch / 512
    total, rise = epochs * steps, 5 * steps

    def rate(update: int) -> float:
        if update < rise:
            return 1e-6 + update * (peak - 1e-6) / rise
        return 1e-5 + 0.5 * (peak - 1e-5) * (1 + math.cos(math.pi * update / total))

    return Published(
        steps=steps,
        epochs=epochs,
        rate=rate,
        start="uniform",
        sizes=(4 / 255, 8 / 255 / 3),
        pixels=IMAGENET_PIXELS,
        keep=constant_decay(0.9998),
        opt="adamw",
        exempt=("1d", "listed"),
        by_epoch=lambda epoch: (4 / 255, 8 / 255 / 3 * min(epoch, 5) / 5),
    )


def fast_imagenet() -> Published:
    """Wong et al.'s first phase: lr_epochs [0, 1, 6], lr_values [0, 0.4, 0.04] at (update + 1) / steps."""
    steps = (IMAGENET - 1000) // 512 + 1
    return Published(
        steps=steps,
        epochs=6,
        rate=lambda update: float(np.interp((update + 1) / steps, [0, 1, 6], [0, 0.4, 0.04])),
        start="uniform",
        sizes=(4 / 255, 5 / 255),
        norms=False,
        pixels=IMAGENET_PIXELS,
    )


@cache
def plain_cycle(lr: float, total: int, share: float) -> list[float]:
    """Rates of OneCycleLR by update."""
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = OneCycleLR(optimizer, max_lr=lr, pct_start=share, total_steps=total, cycle_momentum=False)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def of_release(release: Release) -> Published:
    """A protocol of `releases`, as it is held against the training itself in test_recipe_tables."""

    def rates(update: int) -> tuple[float, float]:
        return release.rates(*divmod(update, release.steps), release.steps)

    return Published(
        steps=release.steps,
        epochs=release.epochs,
        rate=lambda update: rates(update)[0],
        momentum=lambda update: rates(update)[1],
        keep=None if release.average is None else ramp(release.average + 1),
        buffers="average" if release.average is None else "copy",
        norms=release.decay[1] > 0,
        start=release.start,
        sizes=release.attack[:2],
        raw_shortcut=release.raw_shortcut,
        pixels=CIFAR_PIXELS if release.red == OLD_RED else None,
    )


def published() -> dict[str, Published]:
    """Every recipe's release by the recipe's name, also those that there is no recipe of yet."""
    dynat = by_epoch(0.2, {75: 0.1, 90: 0.01}, first=0.04)
    fast = plain_cycle(0.2, 30 * 192, 0.3)
    linear = plain_cycle(0.4, 100 * 96, 0.05)
    return {
        **{name: of_release(release) for name, release in RELEASES.items()},
        "pgd-at-wa": fast_at(383, "uniform", TWO),
        "fastat-pgi": fast_at(383, "own"),
        "fastat-nuat": fast_at(383, "own"),
        "fastat-liet": fast_at(383, "own"),
        "fastat-gradalign": fast_at(383, "none"),
        "wang2023": gowals(0.2, 400, updates_of(512)),
        "wang2023-20m": gowals(0.2, 2400, updates_of(2048)),
        "gowal2021": gowals(0.4, 400, updates_of(1024)),
        # The average of train-wa.py has its warm-up with --scheduler cosinew, Gowal et al.'s, only; the
        # command in the README leaves that flag at its default, a one-cycle per update.
        "rade2022-1m": gowals(0.4, 400, updates_of(1024)),
        "bartoldson2024": gowals(0.1, 6820, updates_of(2048)),
        "ikl2024": ikl(383),
        "idbh2023": Published(
            steps=49_000 // 128,
            epochs=200,
            rate=lambda update: 0.1 * 0.1 ** sum(update // (49_000 // 128) >= at for at in (100, 150)),
            start="none",
            sizes=(EIGHT, TWO),
            raw_shortcut=True,
        ),
        "singh2023-convnext-t": singh("singh2023-convnext-t"),
        "singh2023-vit-s": singh("singh2023-vit-s"),
        "liu2023-swin": ares(),
        "fast-imagenet": fast_imagenet(),
        # Ours, from known parts.
        "fast": Published(
            steps=192,
            epochs=30,
            rate=lambda update: fast[update],
            start="gaussian",
            sizes=(EIGHT, TWO),
            keep=ramp(0.1 * 30 * 192 + 1),
        ),
        "dynat-256": Published(
            steps=192,
            epochs=100,
            rate=lambda update: dynat(update // 192, update % 192, 192)[0],
            start="gaussian",
            sizes=PUBLISHED[:2],
        ),
        "dynat-512": Published(
            steps=96, epochs=100, rate=lambda update: linear[update], start="gaussian", sizes=PUBLISHED[:2]
        ),
    }
