"""`--compile`: whole graphs, none of them made twice, and the numbers of eager mode."""

import pytest
import torch
from conftest import needs
from support.compiled_training import EPOCH, dynat_step, weights_after
from support.fallbacks import CollectedIn, NoFallbacks
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fastdynat.execution.compiling import MODES, compile_whole


@needs("cxx")
@pytest.mark.parametrize(("amp", "tolerance"), [("off", 1e-5), ("bf16", 5e-3)])
def test_no_breaks_no_recompilation_and_eagers_numbers(amp: str, tolerance: float) -> None:
    compiled = dynat_step("default", amp)
    counters.clear()
    weights_after(compiled, epochs=1)
    # Per batch shape: the attack's step, the guide, the model with its gradient, the model's clean pass
    # without.
    assert counters["stats"]["unique_graphs"] == 4 * len(set(EPOCH))
    assert not counters["graph_break"]
    counters.clear()
    weights_after(compiled, epochs=2)
    assert counters["stats"]["unique_graphs"] == 0, "recompiled after the first epoch"

    got, want = weights_after(dynat_step("default", amp), 2), weights_after(dynat_step("off", amp), 2)
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


@needs("cxx")
def test_many_networks_of_one_class_do_not_use_up_each_others_recompilations() -> None:
    limit = torch._dynamo.config.recompile_limit
    x = torch.rand(3, 4)
    for width in range(2, limit + 4):  # other shapes, so that each is a compilation of its own
        network = nn.Sequential(nn.Linear(4, width))
        counters.clear()
        compile_whole(network, mode="default", what="it", fallbacks=NoFallbacks())(x)
        assert counters["stats"]["unique_graphs"] == 1


@needs("cxx")
def test_what_cannot_be_one_graph_runs_in_parts_and_says_so() -> None:
    def branches(x: Tensor) -> Tensor:
        return x + 1 if float(x.sum()) > 0 else x - 1

    said: list[str] = []
    compiled = compile_whole(branches, mode="default", what="the model", fallbacks=CollectedIn(said))
    for x in (torch.ones(3), -torch.ones(3), torch.ones(3)):
        torch.testing.assert_close(compiled(x), branches(x))
    assert len(said) == 1
    assert said[0].startswith("the model runs in several compiled parts: ")


@pytest.mark.parametrize("own_fallback", [False, True])
def test_a_compiler_that_fails_is_said_once(monkeypatch: pytest.MonkeyPatch, own_fallback: bool) -> None:
    def fails(*args: object, **kwargs: object) -> object:
        def call(*args: object) -> object:
            raise torch._dynamo.exc.BackendCompilerFailed(fails, RuntimeError("no compiler"), None)

        return call

    monkeypatch.setattr(torch, "compile", fails)
    said: list[str] = []
    otherwise = (lambda x: x * 3) if own_fallback else None
    compiled = compile_whole(
        lambda x: x * 2, mode="default", what="it", fallbacks=CollectedIn(said), otherwise=otherwise
    )
    assert [float(compiled(torch.ones(()))) for _ in range(2)] == ([3, 3] if own_fallback else [2, 2])
    assert len(said) == 1
    assert "without torch.compile" in said[0]
    assert "no compiler" in said[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # Inductor's own
@needs("cxx")
def test_every_mode_compiles() -> None:
    for mode in MODES:
        assert weights_after(dynat_step(mode, "off"), 1).isfinite().all()
