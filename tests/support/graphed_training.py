"""Tiny training steps, run as they are or as captured graphs."""

from typing import Any

import torch
from support.networks import tiny_cnn
from torch import Tensor

from fastdynat.attack_engine.attack_switches import AttackSwitches
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.config import OptimConfig
from fastdynat.data import Batch
from fastdynat.execution.graph_capture import Recorder
from fastdynat.methods import Method
from fastdynat.training.frozen_parts import FrozenParts
from fastdynat.training.networks import NetworkSet
from fastdynat.training.precision import Precision
from fastdynat.training.step import TrainStep

EPOCH = (16, 16, 7)


EPOCHS = 6


def make_step(
    method: Method[Any],
    device: str,
    amp: str = "off",
    recorder: Recorder | None = None,
    freeze: tuple[str, ...] = (),
    **kwargs: Any,
) -> TrainStep:
    switches = AttackSwitches(dtype=torch.bfloat16 if amp == "bf16" else None, channels_last=amp == "bf16")
    guide = tiny_cnn(1) if method.uses_guide else None
    model = tiny_cnn(0)
    FrozenParts(model, freeze).freeze()
    networks = NetworkSet(
        model,
        guide,
        frozen_guide="guide" not in method.trains,
        image_shape=(3, 8, 8),
        device=torch.device(device),
        attack=switches,
        ema=0.9,
    )
    opt = kwargs.pop("opt", "sgd")
    lr = {"sgd": 0.1}.get(opt, 0.003)
    optim = OptimConfig(opt=opt, lr=lr, epochs=1, clip_grad=kwargs.pop("clip_grad", 0.0))
    precision = Precision(amp, torch.device(device))
    spec = kwargs.pop("spec", PGDSpec(0.1, 0.05, 3, start="gaussian"))
    method.epochs, method.num_classes, method.num_images = EPOCHS, 10, max(EPOCH)
    method.buffers = method.make_buffers(torch.zeros(max(EPOCH), 3, 8, 8, device=device))
    return TrainStep(
        method, networks, spec, optim, precision, lambda n: 1 / (1 + n), recorder=recorder, **kwargs
    )


def train(step: TrainStep, device: str = "cpu") -> tuple[list[dict[str, float]], Tensor]:
    """Logs of every step, and all weights, averages and buffers at the end."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(5)
    logs = []
    for size in EPOCH * EPOCHS:
        x, labels = (
            torch.rand(size, 3, 8, 8, generator=generator),
            torch.randint(10, (size,), generator=generator),
        )
        out = step(Batch(x.to(device), labels.to(device), torch.arange(size, device=device)))
        logs.append({key: float(value) for key, value in out.items()})
    networks = [*step.networks.raw.values(), step.networks.deployed()]
    return logs, torch.cat(
        [t.detach().double().flatten().cpu() for net in networks for t in net.state_dict().values()]
    )
