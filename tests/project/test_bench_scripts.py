"""Scripts of bench/: what they time is timed alike."""

from functools import partial
from importlib import import_module

import pytest
import torch
from conftest import ROOT, needs
from torch import Tensor, nn


@needs("torchattacks")
def test_both_sides_of_the_minimal_attacks_are_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is called once before the first timing, in every round, and for its images."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    script = import_module("minimal_attacks")
    x, labels, events = torch.tensor([[0.2], [0.9]]).view(2, 1, 1, 1), torch.tensor([1, 0]), list[str]()
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    net.load_state_dict({"1.weight": torch.tensor([[1.0], [-1.0]]), "1.bias": torch.tensor([0.0, 1.0])})

    def attack(name: str) -> Tensor:
        events.append(name)
        return 1 - x

    class Watch:
        def __init__(self, device: torch.device) -> None:
            pass

        def time(self, call: partial[Tensor]) -> float:
            events.append("timed")
            call()
            return 1.0

    both = partial(attack, "theirs"), partial(attack, "ours")
    monkeypatch.setattr(script, "pairs", lambda *arguments: {"fake": both})
    monkeypatch.setattr(script, "Stopwatch", Watch)
    (row,) = script.measure(net, x, labels, 2)
    assert events == ["theirs", "ours", *(["timed", "theirs", "timed", "ours"] * 2), "theirs", "ours"]
    assert row["times_faster"]["median"] == row["fastdynat"]["success"] == 1.0
