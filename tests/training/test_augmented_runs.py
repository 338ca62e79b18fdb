"""Runs with every kind of augmentation: resumed exactly inside an epoch, and the same in every loader."""

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.own import own_tensors
from support.tiny_run import TINY

from fastdynat import train
from fastdynat.commands.main import main
from fastdynat.data.loader import PlannedLoader
from fastdynat.errors import UserError

AUGMENTED = [
    *("--method", "trades", "--model", "small", "--label-smoothing", "0.1", "--augment", "crop"),
    *("--aa", "randaugment:2:14", "--color-jitter", "0.3", "--reprob", "0.3", "--cutout", "6"),
    *("--mixup", "0.8", "--cutmix", "1", "--mixup-groups", "2"),
]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "last" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("augmented") / "whole"
    assert main(["train", *AUGMENTED, *TINY, "--epochs", "2", "--run-dir", str(run)]) == 0
    return run


def assert_same_weights(run: Path, other: Path) -> None:
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_resumed_inside_an_epoch(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, yielded = tmp_path / "run", 0
    batches = PlannedLoader._batches

    def interrupted(self: PlannedLoader, *arguments: object):
        nonlocal yielded
        for batch in batches(self, *arguments):  # type: ignore[arg-type]
            yielded += 1
            if yielded == 9:  # in the second epoch of 7 steps
                signal.raise_signal(signal.SIGINT)
            yield batch

    with monkeypatch.context() as patched:
        patched.setattr(PlannedLoader, "_batches", interrupted)
        assert main(["train", *AUGMENTED, *TINY, "--epochs", "2", "--run-dir", str(run)]) != 0
    state = torch.load(run / "last" / "state.pt", weights_only=True)
    assert (state["epoch"], state["epoch_step"]) == (1, 2)
    assert main(["train", "--resume", str(run), "--quiet"]) == 0
    assert_same_weights(run, whole)


@pytest.mark.parametrize("channels", [2, 4])
def test_images_whose_channels_are_no_colours(channels: int, tmp_path: Path) -> None:
    images, labels = own_tensors(64)
    data = images.expand(-1, channels, -1, -1).clone(), labels
    flags: dict[str, Any] = {"method": "madry", "steps": 1, "epochs": 1, "batch_size": 16, "model": "small"}
    for augmentation, told in (
        ({"aa": "trivialaugment"}, "aa trivialaugment"),
        ({"aa": "idbh-weak", "augment": "none"}, "aa idbh-weak"),
        ({"color_jitter": 0.4}, "color_jitter 0.4"),
    ):
        refused = rf"{told}: it changes the colours of grey or RGB images, but .* have {channels} channels"
        with pytest.raises(UserError, match=refused):
            train(data=data, run_dir=str(tmp_path / "refused"), **flags, **augmentation)
    assert not (tmp_path / "refused").exists()
    others = {"scale": (0.5, 1.0), "cutout": 4, "reprob": 0.5, "mixup": 0.5, "cutmix": 0.5, "augment": "flip"}
    assert train(data=data, run_dir=str(tmp_path / "run"), **flags, **others).finished


def test_the_torch_loader_trains_the_same_network(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ["--loader", "torch", "--workers", "1", "--epochs", "2", "--run-dir", str(run)]
    assert main(["train", *AUGMENTED, *TINY, *flags]) == 0
    assert_same_weights(run, whole)


def test_extra_images_without_labels_are_not_mixed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = np.zeros((40, 32, 32, 1), dtype=np.uint8)
    np.savez(tmp_path / "extra.npz", image=images)
    extra = ["--method", "vat", "--extra-data", str(tmp_path / "extra.npz"), "--cutmix", "1"]
    assert main(["train", *extra, *TINY, "--run-dir", str(tmp_path / "run")]) == 2
    assert "error: --cutmix 1: the extra images in" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
