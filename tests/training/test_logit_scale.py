"""--logit-scale: training reads the network's logits divided by it; validation and checkpoints do not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.same_run import assert_same_run
from support.stepping import K, make_batch, train_step
from torch import nn

from fastdynat import load_network
from fastdynat.attack_engine.network_modes import attack_mode
from fastdynat.commands.main import main
from fastdynat.config import override
from fastdynat.errors import UserError
from fastdynat.methods import Madry, MadryOptions
from fastdynat.models import build_model, undivided
from fastdynat.training import default_config, new_run, validation
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
    with pytest.raises(UserError, match=r"for networks by name, not for your own mine.py:n;"):
        network(2.0, "/some/where/mine.py:n")


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


@pytest.mark.parametrize("average", [0.0, 0.5], ids=["weights", "average"])
def test_a_run_trains_on_the_divided_logits_and_validates_and_saves_the_networks_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, average: float
) -> None:
    seen: list[nn.Module] = []
    measure = validation.measure

    def watched(model: nn.Module, *args: Any, **options: Any) -> Any:
        seen.append(model)
        return measure(model, *args, **options)

    monkeypatch.setattr(validation, "measure", watched)
    flags = {"logit_scale": 3.0, "ema": average, "run_dir": str(tmp_path / "run"), "epochs": 1, "steps": 1}
    size = {"train_size": 96, "val_size": 20, "batch_size": 32, "amp": "off", "compile": "off", "quiet": True}
    with new_run(override(default_config("madry"), {**flags, **size}, "test")) as trainer:
        trainer.fit()
        networks, x = trainer.networks, torch.rand(4, 1, 8, 8)
        saved = load_network(tmp_path / "run" / "last" / "model.safetensors")[0](x)
        with attack_mode(networks.raw["model"], "eval"), torch.no_grad():
            networks.attack.refresh()
            torch.testing.assert_close(networks.attack.logits(x), networks.raw["model"](x))
            if not average:
                torch.testing.assert_close(networks.raw["model"](x) * 3, saved)
        with attack_mode(seen[-1], "eval"), torch.no_grad():
            torch.testing.assert_close(seen[-1](x), saved)


def test_a_stopped_run_goes_on_bit_by_bit(tmp_path: Path) -> None:
    flags = ["--logit-scale", "1.5", "--ema", "0.5"]
    whole, part = train(tmp_path / "whole", *flags), train(tmp_path / "part", *flags, "--stop-after", "1")
    assert main(["train", "--resume", str(part), "--quiet"]) == 0
    assert_same_run(whole, part)


def test_nonsense_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--logit-scale", "0"]) == 2
    assert "--logit-scale must be above 0, got 0" in capsys.readouterr().err
