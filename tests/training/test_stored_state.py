"""A network that keeps state outside of its state_dict(): never trained into a checkpoint that lacks it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdynat
from fastdynat.api.trained_run import TrainedRun
from fastdynat.attack_engine.engine import AttackEngine
from fastdynat.attack_engine.followed_state import FollowedState
from fastdynat.commands.main import main
from fastdynat.errors import UserError
from fastdynat.training.stored_state import StoredState

RUN: dict[str, Any] = {
    "method": "madry",
    "steps": 1,
    "eps": 0.1,
    "batch_size": 20,
    "epochs": 2,
    "device": "cpu",
}


class Centred(nn.Module):
    """Centres features by a running mean, kept as `kept` says; `step` counts training passes."""

    mu: Tensor

    def __init__(self, kept: str) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4, 10))
        if kept == "attribute":
            self.mu = torch.zeros(10)
        else:
            self.register_buffer("mu", torch.zeros(10), persistent=kept == "persistent")
        self.register_buffer("step", torch.zeros(()), persistent=False)
        self.tables: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 8, 8) -> (N, 10)."""
        h = self.body(x)
        table = self.tables.setdefault(len(x), torch.arange(10) / 10)  # a constant, made when first needed
        if self.training:
            self.step += 1
            self.mu.lerp_(h.detach().mean(0) + 5, 0.5)
        return h - table * self.mu


def _train(kept: str, folder: Path) -> TrainedRun:
    torch.manual_seed(0)
    data = {
        "train": (torch.rand(60, 1, 8, 8), torch.arange(60) % 10),
        "val": (torch.rand(20, 1, 8, 8), torch.arange(20) % 10),
    }
    return fastdynat.train(Centred(kept), data, run_dir=folder / "run", **RUN)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kept", ["non-persistent", "attribute"])
def test_a_tensor_that_checkpoints_lose_is_refused(kept: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Centred changes state while it trains .*persistent buffer"):
        _train(kept, tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_persistent_buffer_beside_a_counter_and_a_lazy_table_is_trained(tmp_path: Path) -> None:
    run = _train("persistent", tmp_path)
    assert run.finished
    assert float(run.model.mu.abs().max()) > 1
    assert float(run.model.step) == 0  # the counter, which the logits do not depend on, is not kept


class Loose(nn.Module):
    """`fc` plus a plain `shift`, with what else a network may hold outside of its state_dict()."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.view, self.shift = self.fc.weight.detach()[0], torch.zeros(3)
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.fc(x.flatten(1))
        return self.seen + self.shift + self.view.sum()


def test_only_a_change_that_loading_loses_counts() -> None:
    model, x = Loose(), torch.rand(2, 1, 2, 2)
    stored = StoredState(model, x)
    model(x).sum().backward()  # `seen` is no leaf now
    with torch.no_grad():
        model.fc.weight.mul_(2)  # and with it its view
    stored.check()
    model.shift = torch.full((3,), 0.5)  # in a new tensor, as attacks follow it
    with pytest.raises(UserError, match="Loose changes state while it trains"):
        stored.check()
    with torch.no_grad():
        model.shift.zero_()
    stored.check()
    model.fc = nn.Linear(4, 4)
    with pytest.raises(UserError, match=r"a checkpoint of Loose cannot be loaded.*keep their shapes"):
        stored.check()


COUNTERS = """
import torch
from torch import nn


class WarmUp(nn.Module):
    def __init__(self, classes, kept):
        super().__init__()
        self.net = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(64, classes))
        self.kept, self.step, self.calls = kept, 0, 0
        self.register_buffer("moved", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))

    def forward(self, x):
        self.calls += 1  # which changes nothing
        if self.training:
            self.step += self.kept == "number"
            self.moved += self.kept == "buffer"
            self.replaced = self.replaced + (self.kept == "replaced")
        moved = (self.moved + self.replaced) / 10
        return self.net(x) / max(0.1, 1 - self.step / 10) / (1 - moved).clamp_min(0.1)


def number(num_classes):
    return WarmUp(num_classes, "number")


def buffer(num_classes):
    return WarmUp(num_classes, "buffer")


def replaced(num_classes):
    return WarmUp(num_classes, "replaced")
"""


@pytest.mark.parametrize(("kept", "code"), [("number", 2), ("buffer", 0), ("replaced", 2)])
def test_state_that_attacks_do_not_follow_is_refused(
    kept: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net.py").write_text(COUNTERS)
    model = f"{tmp_path / 'net.py'}:{kept}"
    sizes = ["--train-size", "80", "--val-size", "20", "--batch-size", "20"]
    flags = [*sizes, "--steps", "1", "--epochs", "2", "--quiet"]
    assert main(["train", "--run-dir", str(tmp_path / "run"), "--model", model, *flags]) == code
    assert ("WarmUp changes state while it trains" in capsys.readouterr().err) is (code == 2)


class Scaled(nn.Module):
    """Attributes: scale: a number that the logits depend on; calls: one that they do not."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale, self.calls = nn.Linear(48, 10), 1.0, 0

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 4, 4) -> (N, 10)."""
        self.calls += 1
        return self.scale * self.fc(x.flatten(1))


@pytest.mark.parametrize("what", ["attacks do not follow", "checkpoint, does not hold"])
def test_only_numbers_that_change_the_logits_count(what: str) -> None:
    model, x = Scaled(), torch.rand(2, 3, 4, 4)
    state: Any = StoredState(model, x)
    if what == "attacks do not follow":
        state = FollowedState(model, AttackEngine(model, x), x)
    model(x)
    with torch.no_grad():
        model.fc.weight.mul_(2)
    state.check()
    model.scale = 1.5
    with pytest.raises(UserError, match=rf"{what}.* differ by 0\.3 .*register_buffer"):
        state.check()
