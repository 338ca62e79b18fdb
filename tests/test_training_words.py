"""What cannot work is refused before work, and what went wrong is said in words: weights, batches of one, threads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastdynat
from fastdynat.cli import main
from fastdynat.data import ImageSet
from fastdynat.engine.trainer import Trainer
from fastdynat.errors import UserError
from fastdynat.evaluation import check_masking
from fastdynat.models.finite import not_numbers
from fastdynat.runs import load_network
from fastdynat.runs.manifest import sha256, write_manifest

TINY = ["--train-size", "60", "--val-size", "20", "--batch-size", "30", "--steps", "1", "--model", "small", "--quiet"]


def train(run: Path, *flags: str, code: int = 0) -> Path:
    assert main(["train", "--run-dir", str(run), *TINY, "--method", "madry", "--epochs", "1", *flags]) == code
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "run")


def spoilt(run: Path, key: str, value: float, copy: Path) -> Path:
    """A copy of `run` whose weights hold `value` in two places of `key`, and whose records agree with that."""
    import shutil

    shutil.copytree(run, copy, symlinks=True)
    for folder in {(copy / link).resolve() for link in ("best", "last")}:
        file = folder / "model.safetensors"
        state = load_file(file)
        state[key].flatten()[:2] = value
        save_file(state, file, metadata={"format": "pt"})
        about = json.loads(file.with_suffix(".json").read_text())
        file.with_suffix(".json").write_text(json.dumps({**about, "sha256": sha256(file)}))
        write_manifest(folder)
    return copy


USES = {
    "eval": ["eval", "RUN", "--attacks", "clean"],
    "export": ["export", "RUN", "--out", "OUT.pt2", "--format", "torch"],
    "report": ["report", "RUN", "--out", "OUT"],
    "guide": ["train", "--run-dir", "OUT", *TINY, "--method", "ard", "--guide-from", "RUN"],
    "source": ["eval", "GOOD", "--source", "RUN", "--attacks", "transfer-pgd2"],
    "resume": ["train", "--resume", "RUN", "--epochs", "2"],
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("use", USES)
def test_weights_that_are_no_numbers_are_refused(
    use: str, value: float, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = next(key for key in load_file(finished / "best" / "model.safetensors") if key.endswith("weight"))
    run = spoilt(finished, key, value, tmp_path / "spoilt")
    words = {"RUN": run, "GOOD": finished, "OUT": tmp_path / "out", "OUT.pt2": tmp_path / "out.pt2"}
    if use == "resume":
        config = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(config.replace("schedule: piecewise", "schedule: constant"))
    capsys.readouterr()
    assert main([str(words.get(word, word)) for word in USES[use]]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "model.safetensors: 2 of " in error
    assert f"values of {key} are NaN or infinite" in error
    assert not (tmp_path / "out.pt2").exists()


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_statistics_that_are_no_numbers_are_refused(name: str, finished: Path, tmp_path: Path) -> None:
    key = next(key for key in load_file(finished / "best" / "model.safetensors") if key.endswith(name))
    run = spoilt(finished, key, float("inf"), tmp_path / "spoilt")
    with pytest.raises(UserError, match=f"2 of .* values of {key} are NaN or infinite"):
        load_network(run / "best" / "model.safetensors")


def test_a_mask_may_hold_infinity() -> None:
    network = nn.Linear(2, 2)
    network.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    network.register_buffer("count", torch.tensor([3]))
    assert not_numbers(network) == ""
    network.mask[0] = float("nan")
    assert not_numbers(network) == "1 of 2 values of mask are NaN or infinite"
    with torch.no_grad():
        network.bias[1] = float("inf")
    assert not_numbers(network) == "1 of 2 values of bias are NaN or infinite, and in 1 more tensor(s)"


def test_a_users_network_with_nan_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = "import torch\ndef make():\n    n = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1024, 10))\n"
    (tmp_path / "net.py").write_text(source + "    n[1].weight.data[3] = float('nan')\n    return n\n")
    assert main(["eval", f"{tmp_path / 'net.py'}:make", "--data", "digits", "--attacks", "clean"]) == 2
    assert "net.py:make: 1024 of 10240 values of 1.weight are NaN or infinite" in capsys.readouterr().err


def test_nan_logits_are_not_called_random() -> None:
    class Nan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.flatten(1)) / torch.zeros(())

    images = ImageSet(torch.zeros(8, 1, 2, 2, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))
    options: dict[str, Any] = {"norm": "linf", "eps": 0.1, "device": torch.device("cpu"), "batch_size": 8, "seed": 0}
    check = next(c for c in check_masking(Nan(), images, **options).checks if c.name == "repeated answers")
    assert not check.passed
    assert "NaN" in check.evidence
    assert "randomness" not in check.remedy


def test_the_update_that_makes_weights_nan_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loss is computed before its update, so the last update of an epoch shows in no loss."""
    real = Trainer._finish_epoch

    def spoil(self: Trainer, *args: Any) -> None:
        if self.epoch == 1:
            with torch.no_grad():
                next(self.networks.raw["model"].parameters()).fill_(float("nan"))
        real(self, *args)

    monkeypatch.setattr(Trainer, "_finish_epoch", spoil)
    run = train(tmp_path / "run", "--epochs", "3", code=1)
    said = " ".join(capsys.readouterr().err.split())
    assert "training diverged:" in said
    assert "are NaN or infinite" in said
    assert not_numbers(load_network(run / "last" / "model.safetensors")[0]) == ""


def test_weights_are_not_for_runs(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(finished), "--attacks", "clean", "--weights", "nosuch"]) == 2
    assert "--weights nosuch is for models such as torchvision:NAME" in capsys.readouterr().err


# Batches of one, and classes that are not there.


@pytest.mark.parametrize("method", ["madry", "dynat"])
def test_batches_of_one_where_batch_norm_sees_one_value(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    flags = ["--model", "resnet18", "--image-size", "8", "--batch-size", "1", "--method", method]
    train(run, *flags, code=2)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "batch size 1: the batch norm " in error
    assert "use --batch-size 2 or more" in error
    assert not run.exists()


@pytest.mark.parametrize("flags", [["--model", "small"], ["--model", "resnet18-gn", "--image-size", "8"]])
def test_batches_of_one_that_can_be_trained(flags: list[str], tmp_path: Path) -> None:
    train(tmp_path / "run", *flags, "--train-size", "12", "--batch-size", "1")


@pytest.mark.parametrize("target", [10, -1])
def test_a_target_function_that_returns_no_class(target: int) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
    attack = fastdynat.PGD(model, steps=2)
    attack.set_mode_targeted_by_function(lambda images, labels: torch.full_like(labels, target))
    with pytest.raises(UserError, match=f"returned class {target}, but the model's classes are 0 to 9"):
        attack(torch.rand(2, 3, 2, 2), torch.tensor([0, 1]))
    attack.set_mode_targeted_by_function(lambda images, labels: (labels + 1) % 10)
    assert attack(torch.rand(2, 3, 2, 2), torch.tensor([0, 1])).shape == (2, 3, 2, 2)


# Where a resumed run is no longer exact.


def edited(run: Path, **changes: Any) -> None:
    starts = json.loads((run / "environment.json").read_text())
    starts[-1].update(changes)
    (run / "environment.json").write_text(json.dumps(starts))


CHANGES = {
    "threads": (
        {"threads": 77},
        "threads change from 77 to {} (OMP_NUM_THREADS=77 keeps them): the run goes on, not bit for bit",
    ),
    "torch": ({"torch": "1.0"}, "PyTorch changes from 1.0 to {}: the run goes on, not bit for bit"),
    "processor": ({"cpu": "8-core Z80"}, "the processor changes from Z80 to {}: the run goes on, not bit for bit"),
    "cores": ({"cpu": "99-core {}"}, None),
    "unknown": ({"threads": None}, None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_resume_says_what_makes_it_inexact(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path / "run", "--epochs", "2", "--stop-after", "1")
    now = json.loads((run / "environment.json").read_text())[-1]
    now["processor"] = now["cpu"].partition("-core ")[2]
    changes, expected = CHANGES[name]
    edited(run, **{k: v.format(now["processor"]) if isinstance(v, str) else v for k, v in changes.items()})
    capsys.readouterr()
    assert main(["train", "--resume", str(run), "--quiet"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    if expected is None:
        assert "bit for bit" not in said
    else:
        assert expected.format(now[name]) in said
