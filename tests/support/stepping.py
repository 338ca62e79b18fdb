"""One training step on a tiny float64 network, for comparison with a transcription of a method's formulas."""

from typing import Any

import torch
from torch import Tensor, nn

from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attack_engine.steps import start_point
from fastdynat.config import OptimConfig
from fastdynat.data import Batch
from fastdynat.methods import Method
from fastdynat.training.awp import WeightPerturbation
from fastdynat.training.networks import NetworkSet
from fastdynat.training.precision import Precision
from fastdynat.training.step import TrainStep

EPS, STEP, STEPS, LR, N, K = 0.05, 0.02, 3, 0.1, 8, 4
CPU = torch.device("cpu")


def tiny_network(seed: int) -> nn.Module:
    """Convolution, batch norm, tanh, linear: (n, 3, 8, 8) -> (n, K), float64, smooth everywhere."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 9, K)]
    return nn.Sequential(*layers).double()


def moved_network(seed: int) -> nn.Module:
    """`tiny_network` whose running statistics are away from their start."""
    model = tiny_network(seed)
    model.train()(torch.rand(16, 3, 8, 8, dtype=torch.float64))
    return model


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(N, 3, 8, 8, dtype=torch.float64, generator=generator)
    return Batch(x, torch.randint(K, (N,), generator=generator), torch.arange(N))


def train_step(method: Method[Any], model: nn.Module, guide: nn.Module | None, **optim: Any) -> TrainStep:
    """Plain SGD of rate LR; `attack_bn`, `start`, `spec`, `awp`, `recorder`, `sizes` as in the engine."""
    networks = NetworkSet(
        model,
        guide,
        frozen_guide="guide" not in method.trains,
        image_shape=(3, 8, 8),
        device=CPU,
        attack_bn=optim.pop("attack_bn", "eval"),
    )
    awp, recorder = optim.pop("awp", 0.0), optim.pop("recorder", None)
    start = optim.pop("start", "gaussian")
    spec = optim.pop("spec", PGDSpec(EPS, STEP, STEPS, start=start))
    method.num_classes, method.num_images = K, N
    method.buffers = method.make_buffers(torch.zeros(N, 3, 8, 8, dtype=torch.float64))
    attacks = {key: optim.pop(key) for key in ("others", "norm_choice", "sizes") if key in optim}
    config = OptimConfig(**{"lr": LR, "epochs": 1, "weight_decay": 0.0, "momentum": 0.0, **optim})
    perturbation = WeightPerturbation(model, awp) if awp else None
    attacks |= {"awp": perturbation, "recorder": recorder}
    return TrainStep(method, networks, spec, config, Precision("off", CPU), lambda step: 1.0, **attacks)


def drawn_start(x: Tensor, start: str, eps: float = EPS) -> Tensor:
    """The start of the next attack under the present random state, which is restored."""
    state = torch.get_rng_state()
    drawn = start_point(x, start, norm="linf", eps=eps)
    torch.set_rng_state(state)
    return drawn


def assert_same_step(model: nn.Module, before_and_reference: nn.Module) -> None:
    """Check the update of `model` with `before_and_reference`: old weights and new buffers of the step."""
    for (name, p), q in zip(model.named_parameters(), before_and_reference.parameters(), strict=True):
        assert q.grad is not None
        assert float(q.grad.abs().sum()) > 0, name
        torch.testing.assert_close(p.grad, q.grad, msg=name)
        torch.testing.assert_close(p, q - LR * q.grad, msg=name)
    for (name, b), c in zip(model.named_buffers(), before_and_reference.buffers(), strict=True):
        torch.testing.assert_close(b, c, msg=name)
