"""Every optimiser of --opt: torch's or timm's plain update, resumed, captured, after an overflow in fp16."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import needs
from support.fallbacks import NoFallbacks
from support.graph_sim import SimulatedRecorder
from support.graphed_training import make_step, train
from support.stepping import LR, make_batch, moved_network, train_step
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, Adam, AdamW, Optimizer

from fastdynat.config import OptimConfig
from fastdynat.config.optimizer_kinds import OPTIMIZER_KINDS, usual_betas, usual_decay, usual_eps
from fastdynat.execution.graph_capture import CudaRecorder
from fastdynat.methods import Madry, MadryOptions, Natural, NaturalOptions
from fastdynat.training.optimizers import build_optimizers, load_optimizer_state, optimizer_state
from fastdynat.training.step import TrainStep

UPDATES = 20
CASES: dict[str, dict[str, Any]] = {
    "sgd": {"opt": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
    "adam": {"opt": "adam", "weight_decay": 0.05},
    "adamw": {"opt": "adamw", "weight_decay": 0.05},
    "adamw as revisiting-at": {
        "opt": "adamw",
        "opt_betas": (0.9, 0.95),
        "opt_eps": 1e-6,
        "weight_decay": 0.01,
    },
    "adamw without decay": {"opt": "adamw", "weight_decay": 0.0},
    "lion": {"opt": "lion", "weight_decay": 0.3},
    "lion with other betas": {"opt": "lion", "opt_betas": (0.95, 0.98), "weight_decay": 0.0},
}


def config_of(case: str) -> Any:
    return OptimConfig(lr=1.0, epochs=1, **CASES[case])


def reference(parameters: list[nn.Parameter], config: Any) -> Optimizer:
    """torch's own optimiser, or timm's Lion, one tensor at a time; its rate is a number of Python."""
    usual: dict[str, Any] = {"lr": 0.1, "weight_decay": usual_decay(config), "foreach": False}
    if config.opt == "sgd":
        return SGD(parameters, momentum=config.momentum, nesterov=config.nesterov, **usual)
    usual["betas"] = usual_betas(config)
    if config.opt == "lion":
        return pytest.importorskip("timm.optim").Lion(parameters, **usual)
    kind = {"adam": Adam, "adamw": AdamW}[config.opt]
    return kind(parameters, eps=usual_eps(config), fused=False, **usual)


def parameters_of(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in ((4, 3), (5,), (2, 3, 3, 3))]


class Held(nn.Module):
    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.held = nn.ParameterList(parameters)


def built(parameters: list[nn.Parameter], config: Any, lr: Tensor) -> Optimizer:
    (optimizer,) = build_optimizers({"model": Held(parameters)}, config, lr)
    return optimizer


def gradients(update: int, parameters: list[nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(100 + update)
    for number, p in enumerate(parameters):
        # Now and then a parameter has none, as a layer that was left out.
        missing = number == 1 and update in (0, 7)
        grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        p.grad = None if missing else grad


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("resumed_at", [None, 1, 9])
def test_twenty_updates_equal_the_plain_implementation(case: str, resumed_at: int | None) -> None:
    config, lr = config_of(case), torch.zeros((), dtype=torch.float64)
    ours, theirs = parameters_of(), parameters_of()
    got, want = built(ours, config, lr), reference(theirs, config)
    for update in range(UPDATES):
        if update == resumed_at:
            state = copy.deepcopy(optimizer_state(got))
            got = built(ours, config, lr)
            load_optimizer_state(got, state)
            for group in got.param_groups:
                group["lr"] = lr
        rate = 0.1 / (1 + update)
        lr.fill_(rate)
        want.param_groups[0]["lr"] = rate
        gradients(update, ours)
        gradients(update, theirs)
        got.step()
        want.step()
    start = parameters_of()
    for a, b, first in zip(ours, theirs, start, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert float((a - first).detach().abs().max()) > 0.05


def step_of(case: str, recorder: SimulatedRecorder | None = None, **more: Any) -> TrainStep:
    method: Any = Natural(NaturalOptions()) if more.pop("natural", True) else Madry(MadryOptions())
    network = moved_network(1)
    # Before batch norm its gradient is zero up to rounding: Adam divides by it, Lion takes its sign.
    network[0].bias = None  # type: ignore[index]
    step = train_step(method, network, None, recorder=recorder, **CASES[case], **more)
    parts = (step.method, step.networks, step.spec, step.optim, step.precision)
    return TrainStep(*parts, lambda update: 0.1 / (1 + update), recorder=recorder, awp=step.awp)


def weights(step: TrainStep) -> list[Tensor]:
    return [p.detach().clone() for p in step.networks.raw["model"].parameters()]


@pytest.mark.parametrize("case", CASES)
def test_a_run_of_steps_equals_the_plain_loop(case: str) -> None:
    batch, step = make_batch(), step_of(case)
    network = copy.deepcopy(step.networks.raw["model"])
    optimizer = reference([*network.parameters()], config_of(case))
    for update in range(UPDATES):
        step(batch)
        optimizer.param_groups[0]["lr"] = LR * 0.1 / (1 + update)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(batch.x), batch.labels).backward()
        optimizer.step()
    for p, q in zip(step.networks.raw["model"].parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("more", [{}, {"clip_grad": 0.05, "natural": False}, {"awp": 0.01, "natural": False}])
def test_a_captured_step_reads_rate_and_number_of_steps_anew(case: str, more: dict[str, Any]) -> None:
    recorder = SimulatedRecorder()
    captured, plain = step_of(case, recorder, **more), step_of(case, **more)
    for number in range(8):
        for step in (captured, plain):
            torch.manual_seed(number)
            step(make_batch())
    assert recorder.captured == 1
    assert recorder.replayed > 3
    for p, q in zip(weights(captured), weights(plain), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("opt", OPTIMIZER_KINDS)
def test_torch_lets_its_update_be_captured_on_a_gpu(opt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's optimisers ask whether the stream is being captured."""
    config: Any = OptimConfig(opt=opt, lr=0.1, epochs=1)  # type: ignore[arg-type]
    parameters = parameters_of()
    optimizer = built(parameters, config, torch.tensor(0.1, dtype=torch.float64))
    gradients(3, parameters)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    for name in ("is_available", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    stream = SimpleNamespace(is_capturing=lambda: True)  # which newer releases ask
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda *_: stream)
    optimizer.step()
    plain = AdamW(parameters, lr=0.1)
    with pytest.raises(RuntimeError, match="capturable"):
        plain.step()


@pytest.mark.gpu
@needs("gpu")
@pytest.mark.parametrize("opt", OPTIMIZER_KINDS)
def test_a_cuda_graph_reads_the_rate_anew(opt: str) -> None:
    recorder = CudaRecorder(torch.device("cuda"))
    found = []
    for graph in (recorder, None):
        step = make_step(Madry(MadryOptions()), "cuda", recorder=graph, opt=opt, fallbacks=NoFallbacks())
        found.append(train(step, "cuda")[1])
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("overflows", [{0}, {4}, {0, 1, 5}])
def test_updates_that_overflow_in_fp16_are_as_if_they_had_not_been(case: str, overflows: set[int]) -> None:
    """Weights, averages and the number of steps; the first step's state too."""
    config, lr = config_of(case), torch.tensor(0.01, dtype=torch.float64)
    ours, theirs = parameters_of(torch.float32), parameters_of(torch.float32)
    got, want = built(ours, config, lr), built(theirs, config, lr)
    scaler, plain = GradScaler("cpu", init_scale=4.0), GradScaler("cpu", init_scale=4.0)
    for update in range(8):
        gradients(update, ours)
        gradients(update, theirs)
        for p in (*ours, *theirs):
            if p.grad is not None:
                p.grad = p.grad * 4
        scaler.scale(torch.zeros(()))  # makes the scale, as the loss does
        plain.scale(torch.zeros(()))
        if update in overflows:
            ours[0].grad = torch.full_like(ours[0], float("inf"))
        scaler.step(got)
        scaler.update(4.0)
        if update not in overflows:
            plain.step(want)
            plain.update(4.0)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        for key, value in want.state[b].items():
            torch.testing.assert_close(got.state[a][key], value, rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("opt", OPTIMIZER_KINDS)
def test_the_state_is_there_before_the_first_step_and_stays_in_place(opt: str) -> None:
    config: Any = OptimConfig(opt=opt, lr=0.1, epochs=1)  # type: ignore[arg-type]
    parameters = parameters_of()
    optimizer = built(parameters, config, torch.tensor(0.1, dtype=torch.float64))
    before = {id(p): {k: v.data_ptr() for k, v in optimizer.state[p].items()} for p in parameters}
    assert all(before.values())
    gradients(3, parameters)
    optimizer.step()
    after = {id(p): {k: v.data_ptr() for k, v in optimizer.state[p].items()} for p in parameters}
    assert after == before
