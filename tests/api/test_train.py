"""fastdynat.train: a network and data of the user, in Python."""

import random
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.own import own_net, own_tensors, own_test
from torch import nn

import fastdynat
from fastdynat.commands.main import main
from fastdynat.errors import UserError

QUICK = {
    "method": "madry",
    "steps": 1,
    "eps": 0.02,
    "batch_size": 16,
    "quiet": True,
    "lr": 0.5,
    "schedule": "constant",
}


def train(model: Any, data: Any, folder: Path, **keys: Any) -> fastdynat.TrainedRun:
    return fastdynat.train(model, data, **{**QUICK, "run_dir": folder, **keys})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, fastdynat.TrainedRun]:
    net = own_net()
    return net, train(net, own_tensors(), tmp_path_factory.mktemp("runs") / "own", epochs=3)


def test_the_module_holds_the_best_weights(run: tuple[nn.Module, fastdynat.TrainedRun]) -> None:
    net, trained = run
    assert trained.model is net
    assert not net.training
    assert trained.finished
    assert [row["epoch"] for row in trained.metrics] == [1, 2, 3]
    assert trained.last is trained.metrics[-1]
    assert trained.best["val_pgd10_acc"] == max(row["val_pgd10_acc"] for row in trained.metrics)
    assert trained.best["val_clean_acc"] > 0.2  # chance is 0.1
    loaded = trained.load("best", into=own_net(seed=1)).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in net.state_dict().items())
    assert not torch.equal(net[2].weight, own_net()[2].weight)


def test_the_run_is_an_ordinary_one_without_the_module(
    run: tuple[nn.Module, fastdynat.TrainedRun], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(run[1].run_dir)
    for command in (
        ["eval", folder],
        ["train", "--resume", folder, "--epochs", "4"],
        ["export", folder, "--out", folder + ".pt"],
    ):
        assert main(command) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert "Python object" in line
        assert "fastdynat." in line or "--model" in line
    with pytest.raises(UserError, match=r"load_network\(.*into=my_module\)"):
        fastdynat.load_network(folder)
    assert fastdynat.load_network(folder, into=own_net())[1].epoch == run[1].best["epoch"]


def test_weights_of_another_network_leave_the_module_as_it_was(
    run: tuple[nn.Module, fastdynat.TrainedRun],
) -> None:
    other = own_net()
    other[4] = nn.Linear(32, 7)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(UserError, match="is not a Sequential: size mismatch"):
        fastdynat.load_network(run[1].run_dir, into=other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_a_resumed_run_equals_an_uninterrupted_one(
    run: tuple[nn.Module, fastdynat.TrainedRun], tmp_path: Path
) -> None:
    paused = train(own_net(), own_tensors(), tmp_path / "run", epochs=3, stop_after=1)
    assert not paused.finished
    assert len(paused.metrics) == 1
    net = own_net(seed=7)  # its weights come from the checkpoint
    resumed = fastdynat.train(net, own_tensors(), resume=tmp_path / "run")
    assert resumed.finished
    whole = run[1].load("last", into=own_net()).state_dict()
    found = resumed.load("last", into=own_net()).state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in found.items())
    images, labels = own_tensors()
    with pytest.raises(UserError, match="made with other training data"):
        fastdynat.train(net, (images.flip(3), labels), resume=tmp_path / "run", epochs=4)


def test_8_bit_levels_are_said_for_the_line_of_the_call(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="is read as") as caught:
        trained = train("small", "digits", tmp_path / "run", epochs=1, train_size=64, val_size=20, eps=4)
    assert trained.config.attack.eps == 4 / 255
    (found,) = [w for w in caught if "is read as" in str(w.message)]
    assert str(found.message) == "eps 4.0 is read as 4/255 = 0.0156863 (8-bit levels, because it is above 1)"
    assert found.filename == __file__


def test_resume_auto_starts_a_run_and_then_continues_it(
    run: tuple[nn.Module, fastdynat.TrainedRun], tmp_path: Path
) -> None:
    def again(**keys: Any) -> fastdynat.TrainedRun:
        return train(own_net(), own_tensors(), tmp_path / "run", resume="auto", epochs=3, **keys)

    assert len(again(stop_after=1).metrics) == 1
    assert again().finished
    found, whole = (r.load("last", into=own_net()).state_dict() for r in (again(), run[1]))
    assert all(torch.equal(value, whole[name]) for name, value in found.items())
    for keys in ({"run_dir": None}, {"overwrite": True}):
        with pytest.raises(
            UserError, match='resume="auto" needs the run directory as run_dir, and no overwr'
        ):
            train(own_net(), own_tensors(), **{"folder": tmp_path / "run", **keys, "resume": "auto"})


def test_the_process_is_left_as_it_was(tmp_path: Path) -> None:
    net = own_net()
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    before = (torch.get_rng_state(), np.random.get_state()[1], random.getstate(), torch.get_num_threads())
    filters = list(warnings.filters)
    train(net, {"train": own_tensors(), "val": own_test()}, tmp_path / "run", epochs=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]
    assert torch.get_num_threads() == before[3]
    assert warnings.filters == filters


def test_a_failed_training_leaves_the_module_as_it_was(tmp_path: Path) -> None:
    net = own_net()
    with pytest.raises(fastdynat.training.Diverged, match=r"nothing is saved in .*lower lr"):
        train(net, own_tensors(), tmp_path / "run", epochs=1, lr=1e20, momentum=0.0)
    assert all(torch.equal(value, own_net().state_dict()[name]) for name, value in net.state_dict().items())
    assert net.training


class Wrong(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return {"logits": x}


class Closure(nn.Module):
    """A function inside that deepcopy cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 32), nn.Linear(32, 10)
        self.head = lambda x: self.second(x)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.first(nn.functional.avg_pool2d(x, 4).flatten(1)).relu())


def hooked() -> nn.Module:
    net, extra = own_net(), nn.Linear(32, 32)
    net.add_module("extra", extra)
    net[2].register_forward_hook(lambda module, args, out: extra(out))
    net.forward = lambda x: nn.Sequential.forward(net[:5], x)  # type: ignore[method-assign]
    return net


class InPlace(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x -= 0.5
        return super().forward(x.flatten(1))


REFUSED = {
    "in place": (lambda: InPlace(1024, 10), {}, "InPlace changes its input in place; write x = x - mean"),
    "closure": (Closure, {}, "copy of the Closure still computes with second.weight of the original"),
    "hook": (hooked, {}, "copy of the Sequential still computes with .*weight of the original"),
    "frozen": (lambda: own_net().requires_grad_(False), {}, "no parameter with requires_grad"),
    "no parameters": (
        lambda: nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.AdaptiveAvgPool1d(10)),
        {},
        "no parameter with requires_grad",
    ),
    "unknown key": (lambda: own_net(), {"epsilon": 0.1}, "unknown key 'epsilon': did you mean 'eps'"),
    "group in front": (
        lambda: own_net(),
        {"attack_steps": 3},
        r"^fastdynat.train: unknown key 'attack_steps': did you mean 'steps'\?$",
    ),
    "no near key": (
        lambda: own_net(),
        {"xyzzy": 3},
        "unknown key 'xyzzy': known: .*, step_size, .*, workers",
    ),
    "wrong value": (lambda: own_net(), {"epochs": "ten"}, "epochs must be int or nothing, got 'ten'"),
    "no module": (lambda: own_net, {}, "model must be a torch.nn.Module or a name, got a function"),
    "few logits": (
        lambda: own_net(7),
        {},
        "data has 10 classes, labels 0 to 9, but the network has 7 logits",
    ),
    "many logits": (lambda: own_net(1000), {}, r'"classes": 1000'),
    "no logits": (Wrong, {}, r"Wrong maps two 1x32x32 images to dict, not to logits \(2, classes\)"),
    "other images": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
        {},
        "Sequential does not take 1x32x32 images: RuntimeError: mat1 and mat2",
    ),
    "half": (lambda: own_net().half(), {}, r"weights in torch\.float16, .* pass model\.float\(\)"),
    "double": (lambda: own_net().double(), {}, r"weights in torch\.float64, .* pass model\.float\(\)"),
    "normalize": (lambda: own_net(), {"normalize": "dataset"}, "normalise inside of it"),
    "no effect": (lambda: own_net(), {"gamma": 0.5}, "gamma has no effect: --schedule constant has none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    make, keys, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as caught:
        train(make(), own_tensors(), tmp_path / "run", **{"epochs": 1, **keys})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_remedies_for_an_occupied_folder_are_keywords(
    run: tuple[nn.Module, fastdynat.TrainedRun],
) -> None:
    folder = str(run[1].run_dir)
    told = (
        f"{folder} already holds a run: continue it with resume={folder!r}, or replace it with overwrite=True"
    )
    with pytest.raises(UserError, match=f"^{re.escape(told)}$"):
        train(own_net(), own_tensors(), run[1].run_dir, epochs=1)


def test_the_callers_gradient_mode_does_not_matter(tmp_path: Path) -> None:
    plain = train(own_net(), own_tensors(128), tmp_path / "plain", epochs=1)
    data = own_tensors(128)
    with torch.no_grad():
        trained = train(own_net(), data, tmp_path / "run", epochs=1)
        assert not torch.is_grad_enabled()
    expected = plain.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in trained.model.state_dict().items())


@pytest.mark.parametrize(
    ("keys", "best"),
    [
        ({"val_every": 2, "epochs": 2, "stop_after": 1}, 1),  # nothing was validated yet
        ({"burn_in": 2, "epochs": 3, "stop_after": 2}, 2),  # in the burn-in best follows last
        ({"burn_in": 1, "val_every": 3, "epochs": 3, "stop_after": 2}, 1),
    ],
)
def test_the_best_row_is_that_of_the_returned_weights(
    keys: dict[str, Any], best: int, tmp_path: Path
) -> None:
    trained = train("small", "digits", tmp_path / "run", train_size=64, val_size=32, **keys)
    assert not any(row["best"] for row in trained.metrics)
    assert trained.best["epoch"] == best
    assert trained.last["epoch"] == keys["stop_after"]
    expected = trained.load("last" if best == keys["stop_after"] else "best").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in trained.model.state_dict().items())


def test_names_work_too(tmp_path: Path) -> None:
    trained = train("small", "digits", tmp_path / "run", epochs=1, train_size=128, val_size=32)
    assert trained.config.model.model == "small"
    assert fastdynat.load_network(tmp_path / "run")[1].dataset == "digits"
