"""Twenty float64 steps of any method on tiny networks, by as many processes as there are."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from support.fallbacks import NoFallbacks
from support.method_variants import make_method
from torch import Tensor, nn

from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.config import OptimConfig
from fastdynat.data import Batch
from fastdynat.distributed import world
from fastdynat.distributed.shares import deal
from fastdynat.training.awp import WeightPerturbation
from fastdynat.training.networks import NetworkSet
from fastdynat.training.precision import Precision
from fastdynat.training.step import TrainStep

SIZES = (9, 8, 8, 7, 3)  # uneven shares, and a tail that every process takes whole
EPOCHS, IMAGES, CLASSES = 4, 40, 5
CPU = torch.device("cpu")
SPECS = {
    "fgsm_pgi": PGDSpec(0.1, 0.1, 1, start="none"),
    "free": PGDSpec(0.1, 0.1, 1, start="none"),
    "fgsm_rs": PGDSpec(0.1, 0.125, 1, start="uniform"),
    "n_fgsm": PGDSpec(0.1, 0.1, 1, start="uniform"),
    "grad_align": PGDSpec(0.1, 0.1, 1, start="none"),
    "nu_at": PGDSpec(0.1, 0.1, 1),
    "liet": PGDSpec(0.1, 0.1, 1),
}


def ramped(update: int) -> tuple[float, float]:
    """Radius and step size from 0 to those of `SPECS`."""
    return 0.1 * min(update, 10) / 10, 0.05 * min(update, 10) / 10


class Part(nn.Sequential):
    """A block of which activations can be computed again."""


def network(seed: int, norm: str) -> nn.Module:
    """Convolution, normalisation, tanh, linear: (n, 3, 8, 8) -> (n, CLASSES), float64, smooth everywhere."""
    torch.manual_seed(seed)
    layer = nn.GroupNorm(2, 6) if norm == "group" else nn.BatchNorm2d(6)
    first = Part(nn.Conv2d(3, 6, 3, stride=2), layer, nn.Tanh())
    return nn.Sequential(first, Part(nn.Flatten(), nn.Linear(6 * 9, CLASSES))).double()


def step_of(
    variant: str,
    *,
    norm: str = "group",
    awp: float = 0.0,
    accumulate: int = 1,
    ema: float = 0.0,
    attack_bn: str = "eval",
    sync_bn: bool = True,
    specs: tuple[PGDSpec, ...] = (),
    norm_choice: str = "alternate",
    ramp: bool = False,
    checkpointing: bool = False,
    **optim: Any,
) -> TrainStep:
    """A step of this process, with the attacks `specs` if given; `optim` are fields of `OptimConfig`."""
    method = make_method(variant)
    model = network(1, norm)
    networks = NetworkSet(
        model,
        network(2, norm) if method.uses_guide else None,
        frozen_guide="guide" not in method.trains,
        image_shape=(3, 8, 8),
        device=CPU,
        ema=ema,
        attack_bn=attack_bn,
        sync_bn=sync_bn and norm == "batch" and not world().alone,
        checkpointing=checkpointing,
        fallbacks=NoFallbacks(),
    )
    here = world()
    method.epochs = EPOCHS
    images = deal(max(SIZES), here.rank, here.size).images
    method.num_classes, method.num_images = CLASSES, IMAGES
    method.buffers = method.make_buffers(torch.zeros(images, 3, 8, 8, dtype=torch.float64))
    return TrainStep(
        method,
        networks,
        specs[0] if specs else SPECS.get(method.name, PGDSpec(0.1, 0.05, 3, start="gaussian")),
        OptimConfig(**{"lr": 0.05, "epochs": EPOCHS, "momentum": 0.9, **optim}),
        Precision("off", CPU),
        lambda n: 1 / (1 + n / 10),
        awp=WeightPerturbation(model, awp, warmup=1) if awp else None,
        sizes=ramped if ramp else None,
        accumulate=accumulate,
        others=specs[1:],
        norm_choice=norm_choice,
        seed=7,
        fallbacks=NoFallbacks(),
    )


def batches(epoch: int, pieces: int, *, unlabelled: bool = False) -> Iterator[Batch]:
    """This process's images of each step of an epoch."""
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(IMAGES, 3, 8, 8, dtype=torch.float64, generator=generator)
    labels = torch.randint(CLASSES, (IMAGES,), generator=generator)
    if unlabelled:
        labels[::3] = -1
    order = torch.randperm(IMAGES, generator=generator.manual_seed(epoch))
    here = world()
    for chosen in order[: sum(SIZES)].split(SIZES):
        share = deal(len(chosen), here.rank, here.size, pieces)
        own = chosen[[*share.positions]]
        yield Batch(images[own], labels[own], own, share)


def with_mixed_labels(batch: Batch) -> Batch:
    """`batch` with labels of two classes each, of shares that depend on the image alone."""
    share = (0.5 + batch.indices.double() / (2 * IMAGES))[:, None]
    both = [nn.functional.one_hot(labels, CLASSES) for labels in (batch.labels, (batch.labels + 2) % CLASSES)]
    mixed = share * both[0] + (1 - share) * both[1]
    return Batch(batch.x, batch.labels, batch.indices, batch.share, mixed)


def trained(variant: str, options: dict[str, Any]) -> tuple[Tensor, list[dict[str, float]]]:
    """Weights, statistics and the average's weights after all steps; each step's logs over all processes."""
    torch.manual_seed(100 + world().rank)  # nothing may depend on the global generator
    options = dict(options)
    unlabelled, mixed = options.pop("unlabelled", False), options.pop("mixed", False)
    smoothing = options.pop("label_smoothing", 0.0)
    step, logs = step_of(variant, **options), []
    step.method.label_smoothing = smoothing
    for epoch in range(EPOCHS):
        step.start_epoch(epoch)
        for batch in batches(epoch, options.get("accumulate", 1), unlabelled=unlabelled):
            given = with_mixed_labels(batch) if mixed else batch
            found = {key: float(value) * batch.share.weight for key, value in step(given).items()}
            ranks = world().gather(found)
            logs.append({key: sum(rank.get(key, 0.0) for rank in ranks) for key in sorted({*chain(*ranks)})})
    networks = [*step.networks.raw.values(), *([step.networks.ema.module] if step.networks.ema else [])]
    kept = [t.detach().double().flatten() for net in networks for t in net.state_dict().values()]
    if step.method.name == "ikl" or step.method.follows_images:
        kept += [tensor.double().flatten() for tensor in step.method.buffers.values()]  # equal on all ranks
    return torch.cat(kept), logs
