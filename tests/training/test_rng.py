"""States of random generators: what was saved on one device goes on, on the device of another process."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdynat.training.rng import rng_state, seed_everything, set_rng_state

CPU = torch.device("cpu")
HERE = 0  # the current device


class Machine:
    """GPUs with a generator each, whose state is a tensor of one number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *states: int) -> None:
        self.states = [torch.tensor([state]) for state in states]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(states))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(states))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: HERE)
        monkeypatch.setattr(torch.cuda, "get_rng_state", self._get)
        monkeypatch.setattr(torch.cuda, "set_rng_state", self._set)

    def _get(self, device: torch.device) -> Tensor:
        return self.states[device.index or HERE]

    def _set(self, state: Tensor, device: torch.device) -> None:
        self.states[device.index or HERE] = state

    def numbers(self) -> list[int]:
        return [int(state) for state in self.states]


@pytest.mark.parametrize(
    ("at", "visible", "to", "want"),
    [
        ("cuda:1", (0, 0), "cuda:1", [0, 7]),
        ("cuda:1", (0,), "cuda", [7]),
        ("cuda:1", (0, 0, 0), "cuda:2", [0, 0, 7]),
        ("cuda:1", (0, 0, 0), "cuda", [7, 0, 0]),
    ],
    ids=["same", "fewer GPUs", "more GPUs", "the current one"],
)
def test_the_generator_of_the_run_goes_on_on_its_new_device(
    at: str,
    visible: tuple[int, ...],
    to: str,
    want: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    Machine(monkeypatch, 3, 7)
    saved = rng_state(torch.device(at))
    new = Machine(monkeypatch, *visible)
    set_rng_state(saved, torch.device(to))
    assert new.numbers() == want
    assert not caplog.records


@pytest.mark.parametrize(
    ("saved", "want"),
    [(None, None), ([], None), ([3], 3), ([3, 7], 7), ([3, 7, 8], 7)],
    ids=["on the CPU", "none", "one", "two", "three"],
)
def test_states_of_earlier_versions_and_of_other_devices(
    saved: list[int] | None,
    want: int | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Lists are of an earlier version, with an entry for each GPU; the only entry is the run's."""
    state: dict[str, Any] = rng_state(CPU)
    assert state["cuda"] is None
    state["cuda"] = saved if saved is None else [torch.tensor([number]) for number in saved]
    new = Machine(monkeypatch, 0, 0)
    set_rng_state(state, torch.device("cuda:1"))
    assert new.numbers() == [0, want or 0]
    assert bool(caplog.records) == (want is None)


def test_a_run_on_the_cpu_touches_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    new = Machine(monkeypatch, 1, 2)
    state = rng_state(CPU)
    set_rng_state(state | {"cuda": torch.tensor([9])}, CPU)
    assert new.numbers() == [1, 2]


def test_the_generators_of_the_host_go_on() -> None:
    seed_everything(3, deterministic=False)
    state = rng_state(CPU)
    drawn = [random.random(), np.random.rand(), torch.rand(()).item()]
    set_rng_state(state, CPU)
    assert [random.random(), np.random.rand(), torch.rand(()).item()] == drawn
