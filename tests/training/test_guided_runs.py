"""Guided and distilled methods on the command line: training, resuming, refusals, the masking control."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.same_run import assert_same_run
from torch import nn

from fastdynat.commands.main import main
from fastdynat.config import to_flat
from fastdynat.data import dataset_info
from fastdynat.methods import METHODS
from fastdynat.methods.configs import stored_config
from fastdynat.models import build_model
from fastdynat.runs import Sidecar, load_network, save_weights
from fastdynat.training import build_networks
from fastdynat.training.networks import NetworkSet

TINY = ["--train-size", "64", "--val-size", "20", "--batch-size", "32", "--steps", "2", "--quiet"]
GUIDED = {
    "lbgat": [],
    "lbgat-frozen": ["--freeze-guide"],
    "adagat": ["--pull", "2.5"],
    "hat": ["--awp", "0.005"],
    "ard": ["--attack-bn", "train"],
    "rslad": [],
    "iad": ["--variant", "I", "--begin", "0"],
    "iad-2": ["--variant", "II"],
    "distillation": ["--temperature", "5"],
}
FROZEN = [
    name for name, cls in METHODS.items() if cls.uses_guide and "guide" not in cls(cls.options_type()).trains
]


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("teacher") / "run"
    assert main(["train", "--method", "natural", "--run-dir", str(run), *TINY, "--epochs", "2"]) == 0
    return run


def train(run: Path, name: str, *flags: str, code: int = 0) -> Path:
    argv = ["train", "--method", name.partition("-")[0], "--run-dir", str(run), *TINY, *GUIDED[name], *flags]
    assert main(argv) == code
    return run


def guide_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "last" / "guide.safetensors")


@pytest.mark.parametrize("name", GUIDED)
def test_trains_and_its_checkpoint_evaluates(name: str, teacher: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "run", name, "--epochs", "1", "--guide-from", str(teacher))
    assert main(["eval", str(run), "--attacks", "clean,pgd2", "--json", str(tmp_path / "e.json")]) == 0
    results = json.loads((tmp_path / "e.json").read_text())["results"]
    assert {row["method"] for row in results} == {name.partition("-")[0]}
    assert all(0 <= attack["accuracy"] <= 1 for row in results for attack in row["attacks"])
    given, kept = load_file(teacher / "best" / "model.safetensors"), guide_of(run)
    learns = name in ("lbgat", "adagat")
    assert all(torch.equal(given[key], kept[key]) for key in given) == (not learns)


@pytest.mark.parametrize("name", ["hat", "iad"])
def test_resume_is_bitwise_and_needs_the_teacher_no_more(name: str, teacher: Path, tmp_path: Path) -> None:
    guide, flags = (
        Path(shutil.copytree(teacher, tmp_path / "guide", symlinks=True)),
        ["--epochs", "3", "--guide-from"],
    )
    flags += [str(guide)] + (["--begin", "0.5"] if name == "iad" else [])
    whole = train(tmp_path / "whole", name, *flags)
    parts = train(tmp_path / "parts", name, *flags, "--stop-after", "1")
    shutil.rmtree(guide)
    assert main(["train", "--resume", str(parts), "--quiet"]) == 0
    assert_same_run(whole, parts)


def test_bn_momentum_reaches_a_guide_from_a_run(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start, where its weights are read, and after a resume, where they come from the checkpoint."""
    built: list[nn.Module] = []

    def seen(model: nn.Module, guide: nn.Module, **settings: Any) -> NetworkSet:
        built.extend((model, guide))
        return NetworkSet(model, guide, **settings)

    monkeypatch.setattr(build_networks, "NetworkSet", seen)
    flags = ["--guide-from", str(teacher), "--bn-momentum", "0.02", "--epochs", "2"]
    whole = train(tmp_path / "whole", "lbgat", *flags)
    parts = train(tmp_path / "parts", "lbgat", *flags, "--stop-after", "1")
    assert main(["train", "--resume", str(parts), "--quiet"]) == 0
    assert_same_run(whole, parts)
    norms = [layer for network in built for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(built) >= 6
    assert {layer.momentum for layer in norms} == {0.02}


def test_other_epochs_that_would_have_begun_elsewhere_are_refused(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--guide-from", str(teacher), "--schedule", "constant", "--begin", "0.5", "--epochs", "2"]
    run = train(tmp_path / "run", "iad-2", *flags)
    assert "keep --epochs" in refusal(capsys, "train", "--resume", run, "--epochs", "4", "--quiet")


def refusal(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("name", FROZEN)
def test_a_missing_teacher_is_asked_for(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capsys, "train", "--method", name, "--run-dir", tmp_path / "run", *TINY)
    made_by = {"hat": "natural", "distillation": "natural --temperature 20"}.get(name, "madry")
    assert f"--guide-from RUN (one is made by: fastdynat train --method {made_by} --run-dir RUN)" in line
    assert not (tmp_path / "run").exists()
    if name == "distillation":
        line = refusal(
            capsys, "train", "--method", name, "--run-dir", tmp_path / "run", *TINY, "--temperature", "7"
        )
        assert "natural --temperature 7" in line


def test_a_guide_of_another_temperature_or_method_is_warned_of(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    robust = tmp_path / "robust"
    assert main(["train", "--method", "madry", "--run-dir", str(robust), *TINY, "--epochs", "1"]) == 0
    for guide, temperature, words in (
        (teacher, "5", "was trained with temperature 1.0; the guide of distillation is made by: fastdynat "),
        (teacher / "last" / "model.safetensors", "5", "was trained with temperature 1.0"),
        (robust, "1", "was trained with method madry; the guide of distillation"),
        (teacher, "1", None),
    ):
        capsys.readouterr()
        run = tmp_path / f"{guide.name}-{temperature}"
        flags = ["--guide-from", str(guide), "--temperature", temperature, "--epochs", "1"]
        train(run, "distillation", *flags)
        said = " ".join(capsys.readouterr().err.split())
        assert ("the guide of distillation" in said) == (words is not None)
        assert (words or "").strip() in said
        assert words is None or f"--method natural --temperature {temperature}" in said


def test_every_frozen_guide_is_tested() -> None:
    assert set(FROZEN) == {"ard", "distillation", "hat", "iad", "rslad"}


def test_a_teacher_of_other_classes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = dataset_info("digits")
    assert info is not None
    about: dict[str, Any] = {
        "architecture": "small",
        "num_classes": 7,
        "image_shape": info.image_shape,
        "mean": None,
        "std": None,
    }
    about |= {
        "dataset": "other",
        "class_names": tuple("abcdefg"),
        "role": "model",
        "method": "madry",
        "norm": "linf",
    }
    about |= {"eps": 0.1, "eval_eps": 0.1, "epoch": 1, "val_clean_acc": None, "val_pgd10_acc": None}
    file = tmp_path / "teacher.safetensors"
    save_weights(
        file, build_model("small", num_classes=7, image_shape=info.image_shape).state_dict(), Sidecar(**about)
    )
    line = refusal(
        capsys, "train", "--method", "rslad", "--run-dir", tmp_path / "run", *TINY, "--guide-from", file
    )
    assert "was trained on other (7 classes" in line
    assert "train a guide on digits first" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "ard", "--alpha", "2"], "--alpha must be in [0, 1], got 2"),
        (["--method", "hat", "--helper-weight=-1"], "--helper-weight must be >= 0, got -1"),
        (["--method", "natural", "--temperature", "0"], "--temperature must be above 0, got 0"),
        (["--method", "distillation", "--awp", "0.1", "--guide-from", "TEACHER"], "use --awp 0"),
    ],
)
def test_bad_values(
    flags: list[str], message: str, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [str(teacher) if flag == "TEACHER" else flag for flag in flags]
    assert message in refusal(capsys, "train", "--run-dir", tmp_path / "run", *TINY, *flags)
    assert not (tmp_path / "run").exists()


def test_alpha_is_the_methods_own_where_it_has_one(tmp_path: Path) -> None:
    """Elsewhere it is another spelling of --step-size."""
    own = to_flat(stored_config(train(tmp_path / "own", "lbgat", "--alpha", "2", "--epochs", "1")))
    assert (own["alpha"], own["step_size"]) == (2.0, 0.025)
    argv = [
        "train",
        "--method",
        "madry",
        "--run-dir",
        str(tmp_path / "other"),
        *TINY,
        "--alpha",
        "2/255",
        "--epochs",
        "1",
    ]
    assert main(argv) == 0
    assert to_flat(stored_config(tmp_path / "other"))["step_size"] == 2 / 255


@pytest.mark.slow
def test_defensive_distillation_masks_and_the_margin_attack_shows_it(tmp_path: Path) -> None:
    """At temperature 20 most cross-entropy gradients vanish in float32, and most of a margin's do too."""
    flags = [
        "--temperature",
        "20",
        "--epochs",
        "12",
        "--lr",
        "1",
        "--schedule",
        "onecycle",
        "--batch-size",
        "32",
        "--quiet",
    ]
    flags += ["--val-every", "12"]
    teacher, student = str(tmp_path / "teacher"), str(tmp_path / "student")
    assert main(["train", "--method", "natural", "--run-dir", teacher, *flags]) == 0
    assert (
        main(["train", "--method", "distillation", "--guide-from", teacher, "--run-dir", student, *flags])
        == 0
    )
    assert main(["eval", student, "--attacks", "clean,pgd10,cw10", "--json", str(tmp_path / "e.json")]) == 0
    (row,) = [
        r for r in json.loads((tmp_path / "e.json").read_text())["results"] if r["checkpoint"] == "last"
    ]
    clean, pgd, cw = row["attacks"]
    assert clean["accuracy"] > 0.95
    assert pgd["accuracy"] < 0.05
    assert pgd["zero_grad_share"] == 0
    assert cw["accuracy"] < 0.02
    assert cw["zero_grad_share"] == 0


def test_a_teacher_of_the_same_number_of_other_classes_is_refused(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network, sidecar = load_network(teacher / "best" / "model.safetensors")
    file = tmp_path / "other.safetensors"
    save_weights(
        file, network.state_dict(), replace(sidecar, class_names=tuple("abcdefghij"), dataset="letters")
    )
    line = refusal(
        capsys, "train", "--method", "hat", "--run-dir", tmp_path / "run", *TINY, "--guide-from", file
    )
    assert "letters, whose class 0 is 'a', but in digits it is '0'" in line


def test_a_teacher_is_not_overwritten_by_its_pupil(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "train",
        "--method",
        "hat",
        "--guide-from",
        str(teacher),
        "--run-dir",
        str(teacher),
        "--overwrite",
        *TINY,
    ]
    assert main(argv) == 2
    assert "belongs to the run that --overwrite would replace" in capsys.readouterr().err
    assert (teacher / "best" / "model.safetensors").exists()


def test_a_run_is_not_resumed_by_another_method(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", str(teacher), "--method", "vat"]) == 2
    assert "trains by natural, not by vat" in capsys.readouterr().err
