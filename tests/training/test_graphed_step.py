"""A captured training step is the training step: simulated graphs here, CUDA's under `-m gpu`."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import needs
from support.fallbacks import CollectedIn, NoFallbacks
from support.graph_sim import SimulatedRecorder
from support.graphed_training import EPOCH, EPOCHS, make_step, train

from fastdynat.data import Batch
from fastdynat.execution.graph_capture import CudaRecorder
from fastdynat.execution.graphed_call import WARM_UP_CALLS
from fastdynat.methods import Dynat, DynatOptions, Madry, MadryOptions

METHODS = {
    "dynat": lambda: Dynat(DynatOptions()),
    "dynat-kl": lambda: Dynat(
        DynatOptions(inner_loss="kl_self", label_type="soft", guide_mode="eval", extra_kl_weight=1.0)
    ),
    "madry": lambda: Madry(MadryOptions(bn_clean_forward=True)),
}


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_a_captured_step_trains_bit_for_bit_like_the_plain_one(name: str, amp: str) -> None:
    recorder = SimulatedRecorder()
    graphed = make_step(METHODS[name](), "cpu", amp, recorder, clip_grad=0.5, fallbacks=NoFallbacks())
    got, want = train(graphed), train(make_step(METHODS[name](), "cpu", amp, clip_grad=0.5))
    shapes, steps = len(set(EPOCH)), len(EPOCH) * EPOCHS
    assert (recorder.captured, recorder.warmed) == (shapes, shapes * WARM_UP_CALLS)
    assert recorder.replayed == steps - recorder.warmed
    assert got[0] == want[0]
    assert torch.equal(got[1], want[1])


def test_a_constant_of_python_that_changes_is_another_graph() -> None:
    class Ramp(Madry):
        def constants(self) -> tuple[float, ...]:
            return (self.epoch,)

    recorder = SimulatedRecorder()
    step = make_step(Ramp(MadryOptions()), "cpu", recorder=recorder)
    x, labels = torch.rand(4, 3, 8, 8), torch.randint(10, (4,))
    for epoch in (0, 1):
        step.method.epoch = epoch
        for _ in range(WARM_UP_CALLS + 2):
            step(Batch(x, labels, torch.arange(4)))
    assert (recorder.captured, recorder.replayed) == (2, 4)


class Undeclared(Madry):
    """A loss that Python weighs by the time in the run, `share`, without a word to `constants`."""

    def share(self) -> float:
        return (1 + self.epoch) / self.epochs

    def outer(self, *args: Any) -> Any:
        result = super().outer(*args)
        return replace(result, losses={"model": self.share() * result.losses["model"]})


class UndeclaredStep(Undeclared):
    def share(self) -> float:
        return 1 / (1 + self.epoch_step)


class Declared(Undeclared):
    def constants(self) -> tuple[float, ...]:
        return (self.share(),)


class Halves(Undeclared):
    """Two kinds of epochs and of batches, each with one graph."""

    def share(self) -> float:
        return 1.0 + (self.epoch >= self.epochs // 2) + 0.5 * (self.epoch_step % 3 == 0)

    def constants(self) -> tuple[float, ...]:
        return (self.share(),)


@pytest.mark.parametrize(
    ("kind", "graphs"), [(Undeclared, False), (UndeclaredStep, False), (Declared, True), (Halves, True)]
)
def test_a_number_that_changes_with_the_epoch_is_found_where_it_is_not_declared(
    kind: type[Madry], graphs: bool
) -> None:
    """Within the first epoch, before it has changed; then the step goes on as the plain one does."""
    said: list[str] = []
    recorder = SimulatedRecorder()
    graphed = make_step(kind(MadryOptions()), "cpu", recorder=recorder, fallbacks=CollectedIn(said))
    steps = [graphed, make_step(kind(MadryOptions()), "cpu")]
    x, labels = torch.rand(4, 3, 8, 8), torch.randint(10, (4,))
    for step in steps:
        step.method.epochs = 10
        torch.manual_seed(0)
        for epoch in range(2):
            step.start_epoch(epoch)
            for _ in range(4 * (WARM_UP_CALLS + 1)):
                step(Batch(x, labels, torch.arange(4)))
    assert bool(recorder.replayed > 0) == graphs
    assert ["differs from the function" in text for text in said] == [True] * (not graphs)
    for got, want in zip(*(step.networks.raw["model"].parameters() for step in steps), strict=True):
        assert torch.equal(got, want)
    assert (graphed.method.epoch, graphed.method.epoch_step) == (1, 4 * (WARM_UP_CALLS + 1))


def test_a_step_that_waits_for_the_device_goes_on_without_graphs_and_says_why() -> None:
    class Waits(Madry):
        def outer(self, *args: Any) -> Any:
            result = super().outer(*args)
            assert result.losses["model"].item() > 0
            return result

    said: list[str] = []
    recorder = SimulatedRecorder()
    got = train(make_step(Waits(MadryOptions()), "cpu", recorder=recorder, fallbacks=CollectedIn(said)))
    want = train(make_step(Madry(MadryOptions()), "cpu"))
    assert len(said) == 1
    assert "CUDA graphs are off" in said[0]
    assert "waits for the device" in said[0]
    assert recorder.replayed == 0
    assert torch.equal(got[1], want[1])  # the failed recording trained nothing


@pytest.mark.gpu
@needs("gpu")
@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_on_a_gpu(name: str, stream: bool, amp: str) -> None:
    device = torch.device("cuda")
    side = torch.cuda.Stream(device) if stream else None
    graphed = make_step(
        METHODS[name](), "cuda", amp, CudaRecorder(device), guide_stream=side, fallbacks=NoFallbacks()
    )
    got, want = train(graphed, "cuda"), train(make_step(METHODS[name](), "cuda", amp), "cuda")
    # Other convolution algorithms may be chosen, and rounding may flip the sign of a gradient that is noise.
    torch.testing.assert_close(got[1], want[1], rtol=1e-2, atol=1e-2)
