"""Wrong compiled code is found before its results are used, and the run goes on uncompiled."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.compiled_training import dynat_step, weights_after
from support.fallbacks import CollectedIn, NoFallbacks
from support.networks import tiny_cnn
from torch import Tensor, nn

from fastdynat import PGD
from fastdynat.attack_engine.attack_switches import AttackSwitches
from fastdynat.attack_engine.engine import AttackEngine
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.execution import compiling
from fastdynat.execution.compile_check import CompileCheck
from fastdynat.execution.compiling import compile_whole

Fault = Callable[[Callable[..., Any]], Callable[..., Any]]  # a function -> its compiled form


class Doubled(torch.autograd.Function):
    """The identity, with twice its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * grad


def right(fn: Callable[..., Any]) -> Callable[..., Any]:
    return fn


def of_results(change: Callable[[Any], Any]) -> Fault:
    def fault(fn: Callable[..., Any]) -> Callable[..., Any]:
        def compiled(*args: Any) -> Any:
            result = fn(*args)
            return (change(result[0]), *result[1:]) if isinstance(result, tuple) else change(result)

        return compiled

    return fault


def lost_normalisation(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, *others: fn((x - 0.2) / 0.7, *others)


FAULTS: dict[str, Fault] = {
    "reversed": of_results(lambda value: -value),
    "another image's": of_results(lambda value: value.roll(1, 0)),
    "half of it": of_results(
        lambda value: value * (torch.arange(value.shape[1]) > 0).view(-1, *[1] * (value.dim() - 2))
    ),
    "nothing": of_results(lambda value: value * 0),
    "no number": of_results(lambda value: value * torch.nan),
    "lost normalisation": lost_normalisation,
    "gradient twice": of_results(lambda value: Doubled.apply(value) if value.requires_grad else 2 * value),
}


def planted(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    monkeypatch.setattr(torch, "compile", lambda fn, **kwargs: fault(fn))


def view(
    fault: Fault, monkeypatch: pytest.MonkeyPatch, module: nn.Module, said: list[str]
) -> Callable[..., Any]:
    planted(monkeypatch, fault)
    return compile_whole(module, mode="default", what="the model", fallbacks=CollectedIn(said))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_network_is_found(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    module, twin, said = tiny_cnn(0).train(), tiny_cnn(0).train(), list[str]()
    compiled, x = view(FAULTS[fault], monkeypatch, module, said), torch.rand(6, 3, 8, 8)
    draws = torch.get_rng_state()
    for _ in range(3):
        got, want = compiled(x), twin(x)
        assert torch.equal(got, want)
        for network, logits in ((module, got), (twin, want)):
            network.zero_grad()
            logits.logsumexp(1).sum().backward()
    assert all(
        torch.equal(p.grad, q.grad) for p, q in zip(module.parameters(), twin.parameters(), strict=True)
    )  # type: ignore[arg-type]
    assert all(map(torch.equal, module.state_dict().values(), twin.state_dict().values())), (
        "one pass's statistics, not two"
    )
    assert len(said) == 1
    assert said[0].startswith("the model runs without torch.compile: when compiled, its ")
    assert torch.equal(torch.get_rng_state(), draws)


def test_right_code_is_kept_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    module, twin = tiny_cnn(0).train(), tiny_cnn(0).train()
    calls: list[int] = []

    def counting(fn: Callable[..., Any]) -> Callable[..., Any]:
        def compiled(x: Tensor) -> Any:
            calls.append(len(x))
            return fn(x)

        return compiled

    planted(monkeypatch, counting)
    compiled, x = (
        compile_whole(module, mode="default", what="it", fallbacks=NoFallbacks()),
        torch.rand(6, 3, 8, 8),
    )
    for _ in range(4):
        assert torch.equal(compiled(x), twin(x))
        for network in (module, twin):
            with torch.no_grad():
                next(network.parameters()).mul_(1.1)
    assert len(calls) == 4 + 2, "compared at the first call, and once more with other weights"
    assert all(map(torch.equal, module.state_dict().values(), twin.state_dict().values()))


def test_statistics_that_are_not_moved_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    module, said = tiny_cnn(0).train(), list[str]()
    passes = int(module[1].num_batches_tracked)

    def still(fn: Callable[..., Any]) -> Callable[..., Any]:
        def compiled(x: Tensor) -> Any:
            before = [buffer.clone() for buffer in module.buffers()]
            result = fn(x)
            for buffer, value in zip(module.buffers(), before, strict=True):
                buffer.data.copy_(value)
            return result

        return compiled

    compiled = view(still, monkeypatch, module, said)
    compiled(torch.rand(6, 3, 8, 8))
    assert len(said) == 1
    assert "its buffer 1." in said[0]
    assert int(module[1].num_batches_tracked) == passes + 1


def test_the_weights_of_the_compilation_are_found_once_they_are_old(monkeypatch: pytest.MonkeyPatch) -> None:
    module, said = tiny_cnn(0).eval(), list[str]()

    def frozen(fn: Callable[..., Any]) -> Callable[..., Any]:
        return copy.deepcopy(module)

    compiled, x = view(frozen, monkeypatch, module, said), torch.rand(6, 3, 8, 8)
    with torch.no_grad():
        compiled(x)
        assert said == []
        for parameter in module.parameters():
            parameter.mul_(1.3)
        assert torch.equal(compiled(x), module(x))
    assert len(said) == 1


@pytest.mark.parametrize("grads", ["outstanding", "none"])
def test_an_outstanding_graph_of_the_caller_stays_valid(monkeypatch: pytest.MonkeyPatch, grads: str) -> None:
    """The check of a second signature puts statistics back that the first pass's graph has saved."""
    module = tiny_cnn(0).train()
    planted(monkeypatch, right)
    compiled = compile_whole(module, mode="default", what="it", fallbacks=NoFallbacks())
    first = compiled(torch.rand(6, 3, 8, 8))
    compiled(torch.rand(4, 3, 8, 8))
    first.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_dropout_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 50), nn.Dropout(0.5), nn.Linear(50, 10)).train()

    def other_draws(fn: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x: (torch.rand(7), fn(x))[1]

    planted(monkeypatch, other_draws)
    compile_whole(module, mode="default", what="it", fallbacks=NoFallbacks())(torch.rand(6, 3, 8, 8))


def test_without_memory_for_the_comparison_it_is_said_and_compiled_code_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    said: list[str] = []
    planted(monkeypatch, lambda fn: lambda x: x * 2)
    compiled = compile_whole(
        lambda x: x * 2, mode="default", what="it", fallbacks=CollectedIn(said), otherwise=full
    )
    assert [float(compiled(torch.ones(()))) for _ in range(2)] == [2, 2]
    assert len(said) == 1
    assert "not enough memory" in said[0]


@pytest.mark.parametrize("fault", ["reversed", "lost normalisation"])
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_run_with_wrong_code_is_the_run_without_compilation(
    monkeypatch: pytest.MonkeyPatch, fault: str, amp: str
) -> None:
    want = weights_after(dynat_step("off", amp), 1)
    planted(monkeypatch, FAULTS[fault])
    said: list[str] = []
    monkeypatch.setattr(pytest, "fail", said.append)  # who is told by `dynat_step`
    got = weights_after(dynat_step("default", amp), 1)
    assert torch.equal(got, want)
    whom = {text.partition(" runs without torch.compile")[0] for text in said}
    assert whom == {"the attack", "the guide", "the model"} | ({"the guide in eval mode"} & whom)


def from_the_second_call(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Correct where it is compared, wrong afterwards: only the loss that is reached shows it."""
    calls: list[int] = []

    def compiled(*args: Any) -> Any:
        calls.append(1)
        found = fn(*args)
        return found if len(calls) < 3 else found._replace(gradient=-found.gradient)

    return compiled


@pytest.mark.parametrize("fault", [*FAULTS, "later"])
def test_a_wrong_attack_is_found(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    planted(monkeypatch, FAULTS.get(fault, from_the_second_call))
    x, y, said = torch.rand(12, 3, 8, 8), torch.arange(12) % 10, list[str]()
    engine = AttackEngine(
        tiny_cnn().eval(), x[:2], switches=AttackSwitches(compile="default"), fallbacks=CollectedIn(said)
    )
    plain, spec = AttackEngine(tiny_cnn().eval(), x[:2]), PGDSpec(0.1, 0.03, 5)
    for _ in range(2):
        torch.manual_seed(0)
        got = engine.run(x, AttackGoal("ce", y), spec).x_adv
        torch.manual_seed(0)
        assert torch.equal(got, plain.run(x, AttackGoal("ce", y), spec).x_adv)
    assert len(said) == 1
    assert said[0].startswith("the attack runs without torch.compile: when compiled, it")
    assert said[0] in engine.path
    assert ("reaches loss" in said[0]) == (fault == "later")


def test_the_drop_in_attack_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "race", lambda calls: {"off": 2.0, "on": 1.0})
    planted(monkeypatch, FAULTS["reversed"])
    model, x, y = tiny_cnn().eval(), torch.rand(5, 3, 8, 8), torch.arange(5)
    compiled, plain = (PGD(model, eps=0.1, steps=3, random_start=False, compile=on) for on in (True, False))
    with pytest.warns(
        UserWarning,
        match="the attack runs without torch.compile: when compiled, its gradient differs by 2 of",
    ):
        assert torch.equal(compiled(x, y), plain(x, y))


def in_float32(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` as Inductor may compile it under autocast: rounded to half precision less often."""

    def compiled(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return fn(x).to(torch.bfloat16)

    return compiled


# Batch norm undoes a lost normalisation of the images.
@pytest.mark.parametrize("fault", ["none", *sorted(FAULTS.keys() - {"lost normalisation"})])
def test_less_rounding_under_autocast_is_no_fault(fault: str) -> None:
    """The gradient of a bias before batch norm is nothing but rounding; faults are found all the same."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 196, 10)
    ).train()
    compiled = in_float32(module) if fault == "none" else FAULTS[fault](in_float32(module))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = CompileCheck(module)("images", compiled, module, (torch.rand(32, 3, 16, 16),))
    assert (found is None) == (fault == "none"), found
