"""A network whose code changes state in Python while it trains: never attacked in an old state unnoticed."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdynat.attack_engine.engine import AttackEngine
from fastdynat.attack_engine.followed_state import FollowedState
from fastdynat.commands.main import main
from fastdynat.errors import UserError
from fastdynat.evaluation import KeptReplica
from fastdynat.evaluation.measure import _attacked

SOURCE = """
import torch
from torch import nn


class WarmUp(nn.Module):
    def __init__(self, classes, kept):
        super().__init__()
        self.net = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(64, classes))
        self.kept, self.step, self.calls = kept, 0, 0
        self.register_buffer("moved", torch.zeros(()))

    def forward(self, x):
        self.calls += 1  # which changes nothing
        if self.training:
            self.step += self.kept == "number"
            self.moved += self.kept == "buffer"
        return self.net(x) / max(0.1, 1 - self.step / 10) / (1 - self.moved / 10).clamp_min(0.1)


def number(num_classes):
    return WarmUp(num_classes, "number")


def buffer(num_classes):
    return WarmUp(num_classes, "buffer")
"""
RUN = [
    "--train-size",
    "80",
    "--val-size",
    "20",
    "--batch-size",
    "20",
    "--steps",
    "1",
    "--epochs",
    "2",
    "--quiet",
]


@pytest.mark.parametrize(("kept", "code"), [("number", 2), ("buffer", 0)])
def test_a_run_refuses_a_counter_that_attacks_do_not_follow(
    kept: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net.py").write_text(SOURCE)
    model = f"{tmp_path / 'net.py'}:{kept}"
    assert main(["train", "--run-dir", str(tmp_path / "run"), "--model", model, *RUN]) == code
    assert ("WarmUp changes state in Python while it trains" in capsys.readouterr().err) is (code == 2)


class Scaled(nn.Module):
    """Attributes: scale: a number that the logits depend on; calls: one that they do not."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale, self.calls = nn.Linear(48, 10), 1.0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.scale * self.fc(x.flatten(1))


def test_only_what_changes_the_logits_counts() -> None:
    model, x = Scaled(), torch.rand(2, 3, 4, 4)
    followed = FollowedState(model, AttackEngine(model, x), x)
    model(x)
    with torch.no_grad():
        model.fc.weight.mul_(2)
    followed.check()
    model.scale = 1.5
    with pytest.raises(UserError, match=r"differ by 0\.3 .*register_buffer"):
        followed.check()


def test_validation_attacks_the_state_of_now() -> None:
    model, x = Scaled().eval(), torch.rand(4, 3, 4, 4)
    kept = KeptReplica()
    for scale in (1.0, 3.0, 3.0):
        model.scale = scale
        ascent = kept.of(model, (), lambda: _attacked(model, x, None, False, False))
        torch.testing.assert_close(ascent.logits(x), scale * F.linear(x.flatten(1), *model.fc.parameters()))
