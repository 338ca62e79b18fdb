"""DYNAT steps with and without torch.compile."""

from collections.abc import Iterator

import torch
from support.fallbacks import NoFallbacks
from support.networks import tiny_cnn
from torch import Tensor

from fastdynat.attack_engine.attack_switches import AttackSwitches
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.config import OptimConfig
from fastdynat.data import Batch
from fastdynat.methods import Dynat, DynatOptions
from fastdynat.training.networks import NetworkSet
from fastdynat.training.precision import Precision
from fastdynat.training.step import TrainStep
from fastdynat.tuning.devices import AMP_DTYPES

CPU = torch.device("cpu")


EPOCH = (16, 16, 7)  # batch sizes: the last one is short


def dynat_step(mode: str, amp: str) -> TrainStep:
    switches = AttackSwitches(dtype=AMP_DTYPES[amp], channels_last=True, compile=mode)
    networks = NetworkSet(
        tiny_cnn(0),
        tiny_cnn(1),
        image_shape=(3, 8, 8),
        device=CPU,
        channels_last=True,
        attack=switches,
        compile_mode=mode,
        fallbacks=NoFallbacks(),
    )
    spec, optim = PGDSpec(0.1, 0.05, 3, start="gaussian"), OptimConfig(lr=0.1, epochs=1)
    return TrainStep(
        Dynat(DynatOptions()), networks, spec, optim, Precision(amp, CPU), lambda step: 1 / (1 + step)
    )


def batches(epochs: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(1)
    for size in EPOCH * epochs:
        x = torch.rand(size, 3, 8, 8, generator=generator).contiguous(memory_format=torch.channels_last)
        yield Batch(x, torch.randint(10, (size,), generator=generator), torch.arange(size))


def weights_after(step: TrainStep, epochs: int) -> Tensor:
    torch.manual_seed(5)
    for batch in batches(epochs):
        step(batch)
    return torch.cat(
        [p.detach().flatten() for module in step.networks.raw.values() for p in module.parameters()]
    )
