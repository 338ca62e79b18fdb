"""--bn-reset-epoch: an epoch's first step replaces the running statistics, in runs and captured steps."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import needs
from support.fallbacks import NoFallbacks
from support.graph_sim import SimulatedRecorder
from support.networks import tiny_cnn
from support.stepping import CPU, make_batch, moved_network, tiny_network, train_step
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fastdynat.commands.main import main
from fastdynat.data import Batch
from fastdynat.execution.graphed_call import WARM_UP_CALLS
from fastdynat.methods import Madry, MadryOptions, Natural, NaturalOptions
from fastdynat.training.networks import NetworkSet
from fastdynat.training.step import TrainStep

TINY = ["--train-size", "96", "--val-size", "20", "--batch-size", "32", "--steps", "2", "--quiet"]


def own_statistics(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of the convolution's output, which batch norm sees."""
    out = model[0](x).transpose(0, 1).flatten(1)  # type: ignore[index]
    return out.mean(1), out.var(1)


def step_with_reset(at: int, recorder: SimulatedRecorder | None = None) -> TrainStep:
    step = train_step(Natural(NaturalOptions()), moved_network(1), None, recorder=recorder)
    step.statistics_resets = frozenset({at})
    return step


def test_the_step_takes_the_batchs_statistics_and_the_next_goes_on_as_usual() -> None:
    batch, step = make_batch(), step_with_reset(1)
    model = step.networks.raw["model"]
    norm = model[1]  # type: ignore[index]
    for number in range(3):
        before, (mean, var) = norm.running_mean.clone(), own_statistics(model, batch.x)
        step(batch)
        share = 1.0 if number == 1 else 0.1
        torch.testing.assert_close(norm.running_mean, (1 - share) * before + share * mean.detach())
        assert number != 1 or torch.allclose(norm.running_var, var)
        assert norm.momentum == 0.1


def test_a_captured_step_is_not_replayed_there() -> None:
    recorder = SimulatedRecorder()
    captured, plain = step_with_reset(WARM_UP_CALLS + 2, recorder), step_with_reset(WARM_UP_CALLS + 2)
    for _ in range(WARM_UP_CALLS + 5):
        captured(make_batch())
        plain(make_batch())
    assert (recorder.captured, recorder.replayed) == (1, 4)
    a, b = (step.networks.raw["model"].state_dict() for step in (captured, plain))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
@needs("cxx")
def test_a_compiled_network_is_compiled_once_more_and_no_further() -> None:
    def step(mode: str) -> TrainStep:
        networks = NetworkSet(
            tiny_cnn(0), None, image_shape=(3, 8, 8), device=CPU, compile_mode=mode, fallbacks=NoFallbacks()
        )
        made = train_step(Natural(NaturalOptions()), tiny_network(0), None)
        optim, spec = replace(made.optim, lr=0.01), made.spec
        return TrainStep(
            made.method,
            networks,
            spec,
            optim,
            made.precision,
            lambda n: 1.0,
            statistics_resets={2},
            fallbacks=NoFallbacks(),
        )

    counters.clear()
    steps, graphs = [step("off"), step("default")], []
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        x, labels = (
            torch.rand(16, 3, 8, 8, generator=generator),
            torch.randint(10, (16,), generator=generator),
        )
        for one in steps:
            one(Batch(x, labels, torch.arange(16)))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 1, 2, 2, 2]
    plain, compiled = (one.networks.raw["model"].state_dict() for one in steps)
    for key, value in plain.items():
        torch.testing.assert_close(compiled[key], value, rtol=1e-4, atol=1e-5)


def test_an_error_inside_leaves_the_momentum_as_it_was() -> None:
    step = step_with_reset(0)
    batch = make_batch()
    batch.labels = batch.labels[:3]
    with pytest.raises((RuntimeError, ValueError)):
        step(batch)
    assert step.networks.raw["model"][1].momentum == 0.1  # type: ignore[index]


def test_in_a_run_it_happens_in_the_burn_in_and_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, call = [], TrainStep.__call__

    def watched(self: TrainStep, batch: object) -> object:
        number = self.global_step
        hook = self.networks.raw["model"].register_forward_pre_hook(lambda module, x: momenta(module))

        def momenta(module: nn.Module) -> None:
            found = {m.momentum for m in module.modules() if isinstance(m, nn.BatchNorm2d)}
            seen.append((number, *found))

        try:
            return call(self, batch)  # type: ignore[arg-type]
        finally:
            hook.remove()

    monkeypatch.setattr(TrainStep, "__call__", watched)
    flags = [
        "--epochs",
        "5",
        "--burn-in",
        "2",
        "--bn-reset-epoch",
        "1",
        "--bn-momentum",
        "0.01",
        "--method",
        "madry",
    ]
    assert main(["train", "--run-dir", str(tmp_path / "run"), *TINY, *flags]) == 0
    assert {number for number, momentum in seen if momentum == 1.0} == {3, 9}  # three steps to an epoch
    assert {momentum for number, momentum in seen if number not in (3, 9)} == {0.01}


def test_a_network_without_batch_norm_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "wrn-10-1-gn", "--bn-reset-epoch", "1", "--method", "madry"]
    assert main(["train", "--run-dir", str(tmp_path / "run"), *TINY, *flags]) == 2
    assert "--bn-reset-epoch 1: wrn-10-1-gn has no batch norm; leave it out" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_no_option_of_the_step_changes_a_plain_one() -> None:
    """Bit for bit the result from before resets and hooks for statistics existed."""
    a, b = (train_step(Madry(MadryOptions()), tiny_network(1), None, start="uniform") for _ in range(2))
    b.statistics_resets = frozenset({99})
    for step in (a, b):
        torch.manual_seed(0)
        step(make_batch())
    one, other = (step.networks.raw["model"].state_dict() for step in (a, b))
    assert all(torch.equal(one[key], other[key]) for key in one)
