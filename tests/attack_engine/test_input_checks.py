"""Checks of numbers that a GPU still computes: each is checked once, by the first later call that can."""

import copy
import pickle
from dataclasses import dataclass
from typing import Any, cast

import pytest
from support.networks import tiny_cnn
from torch import Tensor

from fastdynat import PGD
from fastdynat.attack_engine import input_checks
from fastdynat.attack_engine.input_checks import DeferredCheck


@dataclass
class Event:
    """A stand-in for torch.cuda.Event: not reached before `reached` says so, and never copied."""

    reached: bool = False

    def query(self) -> bool:
        return self.reached

    def __reduce__(self) -> Any:
        raise TypeError("cannot pickle 'Event' object")


@dataclass
class OnGpu:
    """Numbers on a GPU."""

    values: list[float]
    is_cuda = True

    def tolist(self) -> list[float]:
        return self.values


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """The event of each copy to the host, in their order."""
    made: list[Event] = []

    def on_their_way(numbers: OnGpu) -> tuple[Event, OnGpu]:
        made.append(Event())
        return made[-1], numbers

    monkeypatch.setattr(input_checks, "_on_their_way", on_their_way)
    return made


checked: list[tuple[float, str]] = []


def _note(numbers: list[float], which: str) -> None:
    checked.append((numbers[0], which))
    if numbers[0] > 1:
        raise ValueError(f"bad{which}")


def _call(check: DeferredCheck, value: float) -> None:
    check(cast(Tensor, OnGpu([value])))


def test_no_batch_is_left_out_while_an_earlier_one_is_on_its_way(events: list[Event]) -> None:
    checked.clear()
    check = DeferredCheck(_note)
    for value in (0.0, 0.1, 2.0, 0.3):  # the first at once
        _call(check, value)
    assert checked == [(0.0, "")]
    for event in events[:2]:
        event.reached = True
    with pytest.raises(ValueError, match=r"bad \(of an earlier call\)"):
        _call(check, 0.4)
    _call(check, 0.5)
    for event in events:
        event.reached = True
    _call(check, 0.6)
    earlier = " (of an earlier call)"
    assert checked == [(0.0, ""), *((value, earlier) for value in (0.1, 2.0, 0.3, 0.4, 0.5))]


def test_an_attack_with_a_check_on_its_way_can_be_copied(events: list[Event]) -> None:
    attack = PGD(tiny_cnn(3))
    for _ in range(2):
        attack._check._later(cast(Tensor, OnGpu([0.0, 1.0])), None, False, 1e-3)
    assert len(events) == 1
    for made in (copy.deepcopy(attack), pickle.loads(pickle.dumps(attack))):
        assert made.eps == attack.eps
        assert not made._check._later._pending
    events[0].reached = True
    attack._check._later(cast(Tensor, OnGpu([0.0, 1.0])), None, False, 1e-3)
    assert len(attack._check._later._pending) == 1  # its own checks went on
