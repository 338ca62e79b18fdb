"""SGD with momentum in a tensor: torch's update to the last bits, from any step, captured, resumed."""

import copy

import pytest
import torch
from conftest import needs
from support.fallbacks import NoFallbacks
from support.graph_sim import SimulatedRecorder
from support.graphed_training import make_step, train
from support.stepping import LR, make_batch, moved_network, train_step
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR

from fastdynat.config import OptimConfig
from fastdynat.execution.graph_capture import CudaRecorder
from fastdynat.methods import Madry, MadryOptions, Natural, NaturalOptions
from fastdynat.training.cycled_sgd import CycledSGD
from fastdynat.training.schedules import momentum_at, schedule_factor
from fastdynat.training.step import TrainStep

STEPS = 8
CYCLE = OptimConfig(lr=LR, epochs=STEPS, schedule="onecycle", cycle_momentum=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_equals_torchs_update_under_a_momentum_that_changes(
    dtype: torch.dtype, nesterov: bool, weight_decay: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator).to(dtype) for shape in ((4, 3), (5,))]
    ours, theirs = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    usual = {"nesterov": nesterov, "weight_decay": weight_decay, "momentum": 0.9}
    lr, momentum = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    got, want = CycledSGD(ours, lr=lr, **usual), SGD(theirs, lr=0.1, foreach=False, **usual)
    for p in ours:
        got.state[p]["momentum_buffer"] = torch.zeros_like(p)
    got.param_groups[0]["momentum"] = momentum
    for step in range(STEPS):
        lr.fill_(0.1 / (1 + step))
        momentum.fill_(0.95 - 0.02 * step)
        want.param_groups[0].update(lr=0.1 / (1 + step), momentum=0.95 - 0.02 * step)
        for a, b in zip(ours, theirs, strict=True):
            b.grad = torch.randn(b.shape, generator=generator).to(dtype)
            a.grad = b.grad.clone()
        got.step()
        want.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=16 * torch.finfo(dtype).eps)


def cycled_step(recorder: SimulatedRecorder | None = None, **optim: object) -> TrainStep:
    config = {"nesterov": True, "weight_decay": 0.01, "momentum": 0.9, **optim}
    step = train_step(Natural(NaturalOptions()), moved_network(1), None, recorder=recorder, **config)
    return TrainStep(
        step.method,
        step.networks,
        step.spec,
        step.optim,
        step.precision,
        schedule_factor(CYCLE, 1),
        momentum=momentum_at(CYCLE, 1),
        recorder=recorder,
    )


def test_a_run_of_steps_equals_torchs_one_cycle_scheduler_in_float64() -> None:
    batch, step = make_batch(), cycled_step()
    reference = copy.deepcopy(step.networks.raw["model"])
    optimizer = SGD(reference.parameters(), lr=LR, momentum=0.9, nesterov=True, weight_decay=0.01)
    scheduler = OneCycleLR(optimizer, LR, total_steps=STEPS)
    seen = []
    for n in range(STEPS):
        step(batch)
        group = step.optimizers[0].param_groups[0]
        seen.append(float(group["momentum"]))
        assert seen[-1] == pytest.approx(optimizer.param_groups[0]["momentum"], abs=1e-15)
        assert float(group["lr"]) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-15)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(reference(batch.x), batch.labels).backward()
        optimizer.step()
        if n + 1 < STEPS:
            scheduler.step()
    assert (seen[0], min(seen), seen[-1]) == pytest.approx((0.95, 0.85, 0.95), abs=0.01)
    for p, q in zip(step.networks.raw["model"].parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_a_captured_step_reads_the_momentum_anew() -> None:
    """A number of Python would be frozen in the graph at the value of the capture."""
    recorder = SimulatedRecorder()
    captured, plain = cycled_step(recorder), cycled_step()
    for _ in range(STEPS):
        captured(make_batch())
        plain(make_batch())
    assert recorder.captured == 1
    assert recorder.replayed > 3
    for p, q in zip(
        captured.networks.raw["model"].parameters(), plain.networks.raw["model"].parameters(), strict=True
    ):
        assert torch.equal(p, q)


@pytest.mark.gpu
@needs("gpu")
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_cuda_graph_reads_the_momentum_anew(amp: str) -> None:
    def cycle(number: int) -> float:
        return 0.95 - 0.005 * number

    recorder = CudaRecorder(torch.device("cuda"))
    graphed = make_step(Madry(MadryOptions()), "cuda", amp, recorder, momentum=cycle, fallbacks=NoFallbacks())
    got, want = (
        train(graphed, "cuda"),
        train(make_step(Madry(MadryOptions()), "cuda", amp, momentum=cycle), "cuda"),
    )
    constant = train(make_step(Madry(MadryOptions()), "cuda", amp, momentum=lambda number: 0.95), "cuda")
    torch.testing.assert_close(got[1], want[1], rtol=1e-3, atol=1e-4)
    assert float((got[1] - want[1]).norm()) < 0.01 * float((constant[1] - want[1]).norm())


def test_a_loaded_state_goes_on_with_the_schedules_momentum() -> None:
    whole, first = cycled_step(), cycled_step()
    for _ in range(STEPS):
        whole(make_batch())
    for _ in range(3):
        first(make_batch())
    second = cycled_step()
    second.networks.raw["model"].load_state_dict(first.networks.raw["model"].state_dict())
    second.optimizers[0].load_state_dict(copy.deepcopy(first.optimizers[0].state_dict()))
    second.global_step = first.global_step
    for _ in range(STEPS - 3):
        second(make_batch())
    for p, q in zip(
        second.networks.raw["model"].parameters(), whole.networks.raw["model"].parameters(), strict=True
    ):
        assert torch.equal(p, q)
