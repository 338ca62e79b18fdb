"""torch.compile within bounds: shapes, radii and attacks make few graphs, and the slower one is dropped."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.fallbacks import CollectedIn, NoFallbacks
from support.networks import tiny_cnn
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fastdynat import PGD, trades_loss
from fastdynat.attack_engine.attack_switches import AttackSwitches
from fastdynat.attack_engine.compiled_ascent import MAX_KINDS
from fastdynat.attack_engine.engine import AttackEngine
from fastdynat.attack_engine.goal import AttackGoal
from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.attacks import APGD
from fastdynat.execution import compiling
from fastdynat.execution.compiling import MAX_SIGNATURES, compile_whole

SHAPES = range(1, 22)


@pytest.fixture(autouse=True)
def _traced_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Dynamo traces, guards and counts as usual; the traced code runs eagerly, which saves compile time."""
    real: Callable[..., Any] = torch.compile

    def traced(fn: Any, **kwargs: Any) -> Any:
        kwargs.pop("options", None)
        return real(fn, **kwargs, backend="eager")

    monkeypatch.setattr(torch, "compile", traced)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def batch(n: int, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.rand(n, 3, size, size, generator=generator), torch.arange(n) % 10


def agree_on_all_shapes(one: PGD, other: PGD) -> None:
    for n in SHAPES:
        torch.testing.assert_close(one(*batch(n)), other(*batch(n)), rtol=0, atol=1e-6)


def test_twenty_shapes_and_fifty_radii_are_eight_graphs() -> None:
    model = tiny_cnn(0).eval()
    compiled, plain = (
        PGD(model, steps=2, random_start=False, compile="default"),
        PGD(model, steps=2, random_start=False),
    )
    with pytest.warns(
        UserWarning, match="compiled for 8 shapes of input; others run without torch.compile"
    ) as caught:
        agree_on_all_shapes(compiled, plain)
    assert len(caught) == 1
    assert graphs() == MAX_SIGNATURES
    for k in range(50):
        compiled.eps = plain.eps = (1 + k) / 255
        compiled.alpha = plain.alpha = (1 + k) / 1000
        assert torch.equal(compiled(*batch(5)), plain(*batch(5)))
    assert graphs() == MAX_SIGNATURES, "a radius is no part of a graph"


def test_shapes_that_were_compiled_stay_compiled_after_the_limit() -> None:
    said: list[str] = []
    calls: list[int] = []

    def fn(x: Tensor) -> Tensor:
        return x * 2

    def plain(x: Tensor) -> Tensor:
        calls.append(len(x))
        return x * 2

    run = compile_whole(fn, mode="default", what="it", fallbacks=CollectedIn(said), otherwise=plain)
    for n in [*range(1, 12), *range(1, 12)]:
        assert torch.equal(run(torch.ones(n)), 2 * torch.ones(n))
    assert calls == [*range(1, 9)] + [9, 10, 11] * 2, "each compilation is compared once"
    assert said == ["it is compiled for 8 shapes of input; others run without torch.compile"]


@pytest.mark.parametrize("limit", [1, 3])
def test_a_lower_limit_of_torchs_own_is_kept_to(limit: int) -> None:
    said: list[str] = []
    with torch._dynamo.config.patch(recompile_limit=limit):
        run = compile_whole(nn.Linear(2, 2), mode="default", what="it", fallbacks=CollectedIn(said))
        for n in [*range(1, 7)] * 2:
            assert run(torch.ones(n, 2)).shape == (n, 2)
    assert graphs() == limit
    assert said == [f"it is compiled for {limit} shapes of input; others run without torch.compile"]


@pytest.mark.parametrize("limits", [{}, {"dynamic": False}], ids=str)
def test_a_model_that_torch_compile_has_made_takes_any_number_of_shapes(limits: dict[str, Any]) -> None:
    model = tiny_cnn(0).eval()
    theirs = torch.compile(model, **limits)
    attack, plain = PGD(theirs, steps=1, random_start=False), PGD(model, steps=1, random_start=False)
    with pytest.warns(UserWarning, match="others run without torch.compile|runs without torch.compile"):
        agree_on_all_shapes(attack, plain)
    assert graphs() <= MAX_SIGNATURES


@pytest.mark.filterwarnings("ignore:.*run.? without torch.compile:UserWarning")
def test_a_loss_on_a_compiled_model_takes_any_number_of_shapes_and_radii() -> None:
    model = tiny_cnn(0)
    optimizer, theirs = torch.optim.SGD(model.parameters(), lr=0.0), torch.compile(model)
    for n in range(2, 14):
        x, y = batch(n)
        loss = trades_loss(theirs, x, y, optimizer, step_size=n / 1000, epsilon=n / 255, perturb_steps=1)
        loss.backward()
        assert loss.isfinite()
    before = graphs()
    for k in range(10):
        trades_loss(
            theirs, *batch(4), optimizer, step_size=(k + 1) / 1000, epsilon=(k + 1) / 255, perturb_steps=1
        )
    assert graphs() == before


def test_searches_of_any_radius_are_one_graph_per_shape() -> None:
    engine = AttackEngine(
        tiny_cnn(0).eval(), batch(2)[0], switches=AttackSwitches(compile="default"), fallbacks=NoFallbacks()
    )
    plain = AttackEngine(tiny_cnn(0).eval(), batch(2)[0], switches=AttackSwitches())
    x, y = batch(6)
    for k in range(1, 8):
        spec = APGD(loss="ce", eps=k / 255, steps=3 + k)
        seeds = (torch.Generator().manual_seed(k), torch.Generator().manual_seed(k))
        got, want = (
            spec(e.ascent, x, y, generator=g).x_adv for e, g in zip((engine, plain), seeds, strict=True)
        )
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    # The batch halves at most three times as images are finished.
    assert graphs() <= 1 + engine.ascent.max_halvings


def test_kinds_of_attack_beyond_a_limit_run_uncompiled_and_say_so_once() -> None:
    said: list[str] = []
    engine = AttackEngine(
        tiny_cnn(0).eval(),
        batch(2)[0],
        switches=AttackSwitches(compile="default"),
        fallbacks=CollectedIn(said),
    )
    plain = AttackEngine(tiny_cnn(0).eval(), batch(2)[0], switches=AttackSwitches())
    x, y = batch(3)
    for k in range(MAX_KINDS + 4):
        goal = AttackGoal("margin", y, confidence=0.1 * (k + 1))
        spec = PGDSpec(0.03, 0.01, 1, start="none")
        torch.testing.assert_close(
            engine.run(x, goal, spec).x_adv, plain.run(x, goal, spec).x_adv, rtol=0, atol=1e-6
        )
    assert graphs() == MAX_KINDS
    assert said == [f"{MAX_KINDS} kinds of attack are compiled; further ones run without torch.compile"]


@pytest.mark.parametrize("faster", ["on", "off"])
def test_auto_keeps_the_faster_one_and_says_what_it_gave_up(
    monkeypatch: pytest.MonkeyPatch, faster: str
) -> None:
    def fake(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
        for call in calls.values():
            call()
        return {name: 1.0 if name == faster else 1.5 for name in calls}

    monkeypatch.setattr(compiling, "race", fake)
    said: list[str] = []
    engine = AttackEngine(
        tiny_cnn(0).eval(), batch(2)[0], switches=AttackSwitches(compile="auto"), fallbacks=CollectedIn(said)
    )
    plain = AttackEngine(tiny_cnn(0).eval(), batch(2)[0], switches=AttackSwitches())
    for n in (4, 5):
        x, y = batch(n)
        goal, spec = AttackGoal("ce", y), PGDSpec(0.03, 0.01, 2, start="none")
        torch.testing.assert_close(
            engine.run(x, goal, spec).x_adv, plain.run(x, goal, spec).x_adv, rtol=0, atol=1e-6
        )
    assert graphs() == (2 if faster == "on" else 1)
    if faster == "off":
        assert said == [
            "the attack runs without torch.compile: compiled it takes 1.50x as long on (4, 3, 8, 8)"
        ]
        assert said[0] in engine.path
    else:
        assert said == []


def test_a_bare_compile_is_auto_for_callers_from_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "race", lambda calls: {"off": 1.0, "on": 2.0})
    attack = PGD(tiny_cnn(0).eval(), steps=1, compile=True)
    with pytest.warns(UserWarning, match=r"runs without torch.compile: compiled it takes 2.00x as long"):
        attack(*batch(3))
    insisted = PGD(tiny_cnn(0).eval(), steps=1, compile="default")
    insisted(*batch(3))
    assert "compile" in insisted.path


def test_a_machine_without_a_gpu_is_not_told_of_cuda_home(caplog: pytest.LogCaptureFixture) -> None:
    import logging

    compile_whole(nn.Identity(), mode="default", what="it", fallbacks=NoFallbacks())
    logger = logging.getLogger("torch.utils.cpp_extension")
    logger.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/usr/local/cuda")
    logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
