"""Training that cannot work is refused early, failures are explained: weights, batches of one, threads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastdynat
from fastdynat.commands.main import main
from fastdynat.config import RunConfig
from fastdynat.data import ImageSet
from fastdynat.errors import UserError
from fastdynat.evaluation import check_masking
from fastdynat.evaluation.hints import clean_hint
from fastdynat.evaluation.outcome import wilson
from fastdynat.models.finite import not_numbers
from fastdynat.runs import load_network
from fastdynat.runs.manifest import sha256, write_manifest
from fastdynat.training import validation
from fastdynat.training.average import AverageRule, WeightAverage
from fastdynat.training.average_share import average_note, first_share
from fastdynat.training.trainer import Trainer
from fastdynat.training.watch import Watch

TINY = [
    "--train-size",
    "60",
    "--val-size",
    "20",
    "--batch-size",
    "30",
    "--steps",
    "1",
    "--model",
    "small",
    "--quiet",
]


def train(run: Path, *flags: str, code: int = 0) -> Path:
    assert main(["train", "--run-dir", str(run), *TINY, "--method", "madry", "--epochs", "1", *flags]) == code
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "run")


def spoilt(run: Path, key: str, value: float, copy: Path) -> Path:
    """A copy of `run` with `value` in two entries of the weight `key`, and digests that match."""
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
    source = (
        "import torch\ndef make():\n    n = torch.nn.Sequential(torch.nn.Flatten(), "
        "torch.nn.Linear(1024, 10))\n"
    )
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
    options: dict[str, Any] = {
        "norm": "linf",
        "eps": 0.1,
        "device": torch.device("cpu"),
        "batch_size": 8,
        "seed": 0,
    }
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


@pytest.mark.parametrize("flags", [["--model", "small"], ["--model", "small-gn"]])
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
        "threads change from 77 to {} (OMP_NUM_THREADS=77 keeps them): the run continues, but not bit for "
        "bit",
    ),
    "torch": ({"torch": "1.0"}, "PyTorch changes from 1.0 to {}: the run continues, but not bit for bit"),
    "processor": (
        {"cpu": "8-core Z80"},
        "the processor changes from Z80 to {}: the run continues, but not bit for bit",
    ),
    "cores": ({"cpu": "99-core {}"}, None),
    "unknown": ({"threads": None}, None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_resume_says_what_makes_it_inexact(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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


# Weight averages.


@settings(deadline=None, max_examples=30)
@given(decay=st.floats(0.5, 0.9999), warmup=st.integers(0, 10), updates=st.integers(1, 40))
def test_the_share_of_the_first_weights_is_what_the_average_holds(
    decay: float, warmup: int, updates: int
) -> None:
    """Weights 1 until the last copied step and 0 afterwards: the average is the share of the ones."""
    model = nn.Linear(1, 1, bias=False).double()
    average = WeightAverage(model, AverageRule(decay, warmup=warmup))
    for update in range(updates):
        with torch.no_grad():
            model.weight.fill_(1.0 if update < max(warmup, 1) else 0.0)
        average.update()
    assert first_share(average.rule, updates) == pytest.approx(
        average.module.weight.item(), rel=1e-9, abs=1e-9
    )


def test_what_is_said_of_averages() -> None:
    short = average_note(AverageRule(0.999, warmup=0), epochs=2, updates_per_epoch=8)
    assert short is not None
    assert "still be 99 % the weights of the average's first step" in short  # 0.999 ** 15 = 0.985
    assert "--ema 0.82 or less" in short  # 0.05 ** (1 / 15) = 0.819
    assert first_share(AverageRule(0.82), 16) == pytest.approx(0.05, abs=0.002)
    slow = average_note(AverageRule(0.999, warmup=0), epochs=30, updates_per_epoch=100)
    assert slow is not None
    assert "until epoch 7 validation sees" in slow  # 0.999 ** 699 = 0.497
    assert (
        average_note(AverageRule(0.999, warmup=1600), epochs=2, updates_per_epoch=8) is not None
    )  # never begins
    assert average_note(AverageRule(0.995, warmup=0), epochs=100, updates_per_epoch=391) is None
    assert average_note(AverageRule(0.999, warmup=50), epochs=30, updates_per_epoch=100) is None


def test_a_run_with_a_slow_average_says_so_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path / "run", "--ema", "0.999", "--epochs", "4", "--stop-after", "3")
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("warning: --ema 0.999 over 8 steps") == 1
    assert "guessing" not in said  # which would be of an average that has not begun
    assert main(["train", "--resume", str(run), "--quiet"]) == 0
    assert "--ema" not in capsys.readouterr().err
    train(tmp_path / "other", "--ema", "0.5", "--epochs", "4")
    assert "--ema" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["always", "later", "earlier"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_infinite_buffers_stay_what_they_are_in_an_average(kind: str, value: float) -> None:
    model = nn.BatchNorm1d(2)
    model.register_buffer("mask", torch.tensor([0.0, value if kind != "later" else 0.0]))
    model.register_buffer("scale", torch.tensor([1.0]))
    average = WeightAverage(model, AverageRule(0.9))
    for step in range(4):
        if step == 2 and kind != "always":
            model.mask[1] = value if kind == "later" else 3.0
        model.scale.fill_(2.0 if step else 1.0)
        model.running_mean.fill_(float(step))
        average.update()
    assert average.module.mask.tolist() == [0.0, 3.0 if kind == "earlier" else value]
    assert float(average.module.scale) == pytest.approx(2 - 0.9**3)
    expected = 0.0
    for step in (1, 2, 3):
        expected = 0.9 * expected + 0.1 * step
    assert average.module.running_mean.tolist() == pytest.approx([expected] * 2)


# Collapse without 20 points to lose, and training that learns nothing.

COURSES = {
    "fgsm_rs at eps 0.3": ([0.05, 0.08, 0.0], [0.03, 0.04, 0.86], [2]),
    "it goes on": ([0.08, 0.0, 0.01, 0.0], [0.04, 0.86, 0.5, 0.9], [1]),
    "and comes back": ([0.08, 0.0, 0.10, 0.0], [0.04, 0.86, 0.5, 0.9], [1, 3]),
    "slowly": ([0.08, 0.01, 0.0], [0.10, 0.30, 0.61], [2]),
    "nothing is beaten: eps too large": ([0.10, 0.0, 0.0], [0.10, 0.11, 0.10], []),
    "training was as good before": ([0.10, 0.01], [0.55, 0.60], []),
    "ordinary overfitting": ([0.15, 0.10, 0.05, 0.04], [0.20, 0.60, 0.80, 0.95], []),
    "never anything": ([0.0, 0.0], [0.10, 0.90], []),
}


@pytest.mark.parametrize("name", COURSES)
def test_a_collapse_from_little(name: str) -> None:
    robust, trained, expected = COURSES[name]
    watch = Watch(RunConfig(on_collapse="stop"), "val_pgd10_acc")
    said = [
        n for n, (r, t) in enumerate(zip(robust, trained, strict=True)) if watch.collapse(r, t) is not None
    ]
    assert said == expected
    assert (watch.ended() is not None) == (expected != [] and said[-1] >= 0 and watch.collapsed)


def test_a_far_larger_validation_radius_is_no_collapse() -> None:
    watch = Watch(RunConfig(), "val_pgd10_acc")
    assert watch.collapse(0.08, 0.3, comparable=False) is None
    assert watch.collapse(0.0, 0.9, comparable=False) is None


def test_epochs_of_a_smaller_radius_are_no_reference() -> None:
    """At half the radius the network is right on nearly all attacked training images."""
    watch = Watch(RunConfig(), "val_pgd10_acc")
    assert watch.collapse(0.15, 0.9, comparable=False) is None
    assert watch.collapse(0.14, 0.3) is None
    said = watch.collapse(0.0, 0.8)
    assert said is not None
    assert (
        "is 0.0 %, it was 14.0 %, while accuracy on attacked training images is 80.0 %, it was 30.0 %" in said
    )
    assert watch.collapsed


def test_guessing_is_said_once_after_three_validations() -> None:
    def course(*scores: float, chance: float = 0.1, images: int = 1000) -> list[int]:
        watch = Watch(RunConfig(), "val_clean_acc")
        found = []
        for n, score in enumerate(scores):
            text = watch.at_chance(score, chance, images)
            if text is not None:
                assert f"{100 * score:.1f} %, no better than guessing ({100 * chance:.1f} %)" in text
                found.append(n)
            copy = Watch(RunConfig(), "val_clean_acc")
            copy.load_state_dict(json.loads(json.dumps(watch.state_dict())))
            watch = copy
        return found

    assert course(0.1, 0.09, 0.11, 0.1, 0.1) == [2]
    assert course(0.1, 0.2, 0.1, 0.1) == []
    assert course(0.1, 0.1, 0.3, 0.4) == []
    assert course(0.2, 0.1, 0.1, 0.1, 0.3, 0.1, 0.1, 0.1) == [3]
    assert course(0.13, 0.13, 0.13) == []  # 3 standard errors above
    assert course(0.13, 0.13, 0.13, images=100) == [2]
    assert course(0.6, 0.6, 0.6, chance=0.6) == [2]  # always the most frequent class


def test_a_run_that_learns_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run", "--epochs", "4", "--val-size", "100", "--lr", "1e-7")
    assert capsys.readouterr().err.count("no better than guessing") == 1


def test_a_copy_before_averaging_begins_that_learns_nothing_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--epochs", "4", "--val-size", "100", "--lr", "1e-7", "--swa", "--ema-from", "3"]
    train(tmp_path / "run", *flags)
    assert capsys.readouterr().err.count("no better than guessing") == 1


@pytest.mark.parametrize(
    ("flags", "weak"), [([], 0), (["--eps-ramp", "2"], 1), (["--step-ramp", "2"], 0)], ids=["", "eps", "step"]
)
def test_a_collapse_in_a_run_is_said(
    flags: list[str],
    weak: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """weak: epochs at a smaller radius, in which validation at the full one is no reference."""
    courses = iter([value for robust in (*[0.07] * weak, 0.08, 0.0, 0.0) for value in (0.9, robust)])

    class Found:
        def __init__(self, accuracy: float) -> None:
            self.accuracy = accuracy

    monkeypatch.setattr(validation, "measure", lambda *args, **options: Found(next(courses)))
    trained, real = iter([*[0.8] * weak, 0.04, 0.86, 0.9]), Trainer._validate

    def validate(
        self: Trainer, stop: Any, display: Any, *, due: bool, trained: float | None, values: Any = trained
    ) -> Any:
        return real(self, stop, display, due=due, trained=next(values))

    monkeypatch.setattr(Trainer, "_validate", validate)
    train(tmp_path / "run", "--epochs", str(3 + weak), *flags)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("robustness has collapsed: validation PGD-10 accuracy is 0.0 %, it was 8.0 %") == 1


# Clean accuracy below chance.


def record(correct: int, images: int, classes: int = 10, method: str | None = "madry") -> dict[str, Any]:
    clean = {
        "attack": "clean",
        "accuracy": correct / images,
        "correct": correct,
        "images": images,
        "ci": wilson(correct, images),
    }
    return {"attacks": [clean], "class_names": [f"c{i}" for i in range(classes)], "method": method}


def test_clean_accuracy_below_chance_gets_a_hint() -> None:
    for odd in (
        record(0, 50),
        record(0, 1000),
        record(20, 1000),
        record(0, 6, 2),
        record(95, 1000, method=None),
    ):
        hint = clean_hint(odd)
        assert hint is not None
        assert "numbers its classes from 0 in the data's order ('c0', 'c1'" in hint
    for usual in (
        record(0, 10),
        record(100, 1000),
        record(80, 1000),
        record(900, 1000),
        record(300, 1000, method=None),
    ):
        assert clean_hint(usual) is None
    assert clean_hint({**record(0, 50), "attacks": []}) is None


def test_a_network_that_counts_classes_from_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # results of networks that are no runs are kept under the working directory
    (tmp_path / "net.py").write_text(
        "import torch\nclass Off(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.scale = "
        "torch.nn.Parameter(torch.ones(()))\n"
        "    def forward(self, x):\n"
        "        return self.scale * x.flatten(1).sum(1, keepdim=True) * torch.eye(10)[0]\n"
        "def make():\n    return Off()\n"
    )
    assert main(["eval", f"{tmp_path / 'net.py'}:make", "--data", "digits", "--attacks", "clean"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "chance (10 %), so robust accuracies say nothing: check that the network numbers its classes from 0"
        in out
    )
