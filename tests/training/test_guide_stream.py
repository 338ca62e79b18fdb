"""The guide on a separate stream: every access to memory is ordered by an event after what it depends on."""

from typing import Any

import pytest
import torch
from support.networks import tiny_cnn
from support.streams import Stream, Watch

from fastdynat.attack_engine.pgd_spec import PGDSpec
from fastdynat.config import OptimConfig
from fastdynat.data import Batch
from fastdynat.methods import METHODS
from fastdynat.training import TrainStep
from fastdynat.training.networks import NetworkSet
from fastdynat.training.precision import Precision

CPU = torch.device("cpu")


def watched(monkeypatch: pytest.MonkeyPatch, name: str, without: str = "") -> Watch:
    """Three steps of a method with its guide on the side; `without`: a way of waiting that is left out.

    The networks' device is not the process's current one, whose stream has none of their work.
    """
    watch, of_another_device = Watch(), Stream(2)

    def current_stream(device: torch.device | None = None) -> Stream:
        return watch.current if device == CPU else of_another_device

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(torch.cuda, "stream", watch.on)
    if without:
        monkeypatch.setattr(Stream, without, lambda self, other: None)
    method = METHODS[name](METHODS[name].options_type())
    networks = NetworkSet(tiny_cnn(1), tiny_cnn(2), image_shape=(3, 8, 8), device=CPU)
    optim, spec = OptimConfig(lr=0.1, epochs=1), PGDSpec(0.05, 0.02, 2, start="gaussian")
    stream: Any = watch.side
    step = TrainStep(method, networks, spec, optim, Precision("off", CPU), lambda n: 1.0, guide_stream=stream)
    with watch:
        for _ in range(3):
            step(Batch(torch.rand(6, 3, 8, 8), torch.randint(10, (6,)), torch.arange(6)))
    return watch


@pytest.mark.parametrize("name", ["dynat", "lbgat", "adagat"])
def test_every_access_is_ordered(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = watched(monkeypatch, name)
    assert watch.side_work > 30  # the guide's passes
    assert watch.races == []


@pytest.mark.parametrize("without", ["wait_stream", "wait_event"])
def test_without_waiting_there_would_be_races(without: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert watched(monkeypatch, "dynat", without).races
