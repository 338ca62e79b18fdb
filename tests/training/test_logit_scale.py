"""--logit-scale: training reads the network's logits divided by it; validation and checkpoints do not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.same_run import assert_same_run
from support.stepping import K, make_batch, train_step
from torch import nn

from fastdynat import load_network
from fastdynat.commands.main import main
from fastdynat.errors import UserError
from fastdynat.methods import Madry, MadryOptions
from fastdynat.models import build_model, undivided
from fastdynat.training import validation
from fastdynat.training.layer_depths import backbone_of

SHAPE = (3, 8, 8)
TINY = "--train-size 96 --val-size 20 --batch-size 32 --steps 2 --epochs 2 --amp off --compile off --quiet"


def network(divisor: float, name: str = "small") -> nn.Module:
    torch.manual_seed(0)
    return build_model(name, num_classes=K, image_shape=SHAPE, divisor=divisor).double()


def test_training_divides_and_the_weights_are_those_of_the_network_without() -> None:
    divided, plain, x = network(4.0).eval(), network(1.0).eval(), make_batch().x
    torch.testing.assert_close(divided(x) * 4, plain(x))
    assert list(divided.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(undivided(divided)(x), plain(x))
    assert undivided(plain) is plain
    assert backbone_of(divided) == ("net.", divided.net)


def test_a_network_of_the_user_is_refused() -> None:
    with pytest.raises(UserError, match=r"--logit-scale 2 is for networks by name"):
        network(2.0, "mine.py:network")


@pytest.mark.parametrize("scale", [3.0, 0.5])
def test_a_head_so_much_larger_at_a_rate_times_the_square_trains_alike(scale: float) -> None:
    """Updates and their attacks then see the same function, so that all layers before the head move alike."""
    plain, divided = network(1.0), network(scale)
    with torch.no_grad():
        for tensor in divided.net.linear.parameters():  # type: ignore[operator, union-attr]
            tensor *= scale
    a = train_step(Madry(MadryOptions()), plain, None)
    b = train_step(Madry(MadryOptions()), divided, None, head_lr_scale=scale**2)
    before = plain.state_dict()["net.features.0.weight"].clone()
    for _ in range(3):
        torch.manual_seed(1)
        a(make_batch())
        torch.manual_seed(1)
        b(make_batch())
    ours, theirs = plain.state_dict(), divided.state_dict()
    assert not torch.equal(ours["net.features.0.weight"], before)
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name] * (scale if "linear" in name else 1), msg=name)


def train(folder: Path, *flags: str) -> Path:
    assert main(["train", *TINY.split(), "--run-dir", str(folder), *flags]) == 0
    return folder


@pytest.mark.parametrize("average", [[], ["--ema", "0.5"]], ids=["weights", "average"])
def test_validation_attacks_the_network_that_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, average: list[str]
) -> None:
    seen: list[torch.Tensor] = []
    measure = validation.measure

    def watched(model: nn.Module, *args: Any, **options: Any) -> Any:
        found = measure(model, *args, **options)
        seen.append(model.eval()(x).detach().clone())
        return found

    torch.manual_seed(0)
    x = torch.rand(4, 1, 8, 8)
    monkeypatch.setattr(validation, "measure", watched)
    run = train(tmp_path / "run", "--logit-scale", "3", *average)
    saved = load_network(run / "last" / "model.safetensors")[0]
    assert len(saved) == 2  # type: ignore[arg-type]
    torch.testing.assert_close(seen[-1], saved(x).detach())


def test_a_stopped_run_goes_on_bit_by_bit(tmp_path: Path) -> None:
    flags = ["--logit-scale", "1.5", "--ema", "0.5"]
    whole, part = train(tmp_path / "whole", *flags), train(tmp_path / "part", *flags, "--stop-after", "1")
    assert main(["train", "--resume", str(part), "--quiet"]) == 0
    assert_same_run(whole, part)


def test_nonsense_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--logit-scale", "0"]) == 2
    assert "--logit-scale must be above 0, got 0" in capsys.readouterr().err
