"""fastdynat.evaluate: accuracies with intervals, in Python."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support.own import FILE, own_net, own_tensors, own_test
from torch import nn

import fastdynat
from fastdynat.commands.main import main
from fastdynat.errors import UserError
from fastdynat.evaluation.outcome import wilson


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """A network after a few epochs of natural training."""
    images, labels = own_tensors()
    found = own_net()
    optimizer = torch.optim.Adam(found.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(found(images / 255), labels).backward()
        optimizer.step()
    return found


def test_numbers_are_those_of_the_command(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attacks = "clean,pgd5,fast-autoattack"
    net.train()
    found = fastdynat.evaluate(net, own_test(), attacks, eps=0.05)
    assert net.training  # as it was
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert list(found) == attacks.split(",")
    assert found["clean"] > 0.8
    assert found["fast-autoattack"] <= found["pgd5"] < found["clean"]
    assert found.worst == found["fast-autoattack"]
    for measured in found.measurements.values():
        assert measured.ci == wilson(measured.correct, 100)

    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(FILE)
    torch.save(net.state_dict(), "w.pt")
    command = ["eval", "own.py:make_net", "--weights", "w.pt", "--data", "own.py:make_data", "--eps", "0.05"]
    assert main([*command, "--attacks", attacks, "--cache", "off", "--json", "found.json"]) == 0
    record = json.loads(Path("found.json").read_text())["results"][0]
    assert {a["attack"]: a["accuracy"] for a in record["attacks"]} == dict(found)
    by_name = fastdynat.evaluate("own.py:make_net", "own.py:make_data", "clean", num_images=10)
    assert by_name.images == 10


class Named(nn.Module):
    """Answers with a dict."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"features": x.flatten(1), "scores": self.net(x)}


@pytest.mark.parametrize("output", ["scores", 1, lambda out: out["scores"]])
def test_output_selects_the_logits(net: nn.Module, output: Any) -> None:
    attacks = "clean,pgd2,apgd-t2"
    found = fastdynat.evaluate(Named(net), own_test(40), attacks, eps=0.05, output=output)
    assert dict(found) == dict(fastdynat.evaluate(net, own_test(40), attacks, eps=0.05))
    assert found["pgd2"] < found["clean"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_in_half_precision_is_judged_as_it_answers(net: nn.Module, dtype: torch.dtype) -> None:
    half, (images, labels) = copy.deepcopy(net).to(dtype), own_test()
    found = fastdynat.evaluate(half, (images, labels), "clean,pgd5", eps=0.05)
    with torch.no_grad():
        right = half((images / 255).to(dtype)).argmax(1) == labels
    assert found["clean"] == pytest.approx(float(right.double().mean()))
    # The same weights but for rounding.
    assert found["pgd5"] == pytest.approx(
        fastdynat.evaluate(net, own_test(), "pgd5", eps=0.05)["pgd5"], abs=0.05
    )


def test_every_module_keeps_its_mode() -> None:
    net = nn.Sequential(own_net(), nn.BatchNorm1d(10), nn.Dropout())
    net[1].eval()
    found = fastdynat.evaluate(net, own_test(8), ["clean", "pgd1"])
    assert list(found) == ["clean", "pgd1"]
    assert [net.training, net[0].training, net[1].training, net[2].training] == [True, True, False, True]


def test_it_prints_as_a_table(net: nn.Module) -> None:
    lines = str(fastdynat.evaluate(net, own_test(50), "clean,fgsm", eps=8 / 255)).splitlines()
    assert lines[0].startswith("accuracy on 50 images, linf eps 0.0313725 (8.00/255)")
    rows = [line.split() for line in lines if " to " in line]
    assert [row[1] for row in rows] == ["clean", "fgsm", "worst"]


def test_fewer_classes_in_the_images_than_logits(net: nn.Module) -> None:
    images, labels = own_test()
    few = labels < 3
    assert fastdynat.evaluate(net, (images[few], labels[few]), "clean,apgd-t2", eps=0.1).images == int(
        few.sum()
    )


def test_a_pair_of_parts_means_its_test_part(net: nn.Module) -> None:
    both = (own_tensors(), own_test(20))
    assert fastdynat.evaluate(net, both, "clean").images == 20
    assert fastdynat.evaluate(net, {"train": own_tensors(), "test": own_test(10)}, "clean").images == 10


def test_attacks_as_a_list(net: nn.Module) -> None:
    assert list(fastdynat.evaluate(net, own_test(10), ["fgsm", "clean"], eps=8 / 255)) == ["fgsm", "clean"]


def record_of_command(run: Path, folder: Path, *flags: str) -> dict[str, Any]:
    """What `fastdynat eval` finds for the best checkpoint of `run`."""
    out = folder / "found.json"
    command = ["eval", str(run), "--checkpoints", "best", "--num-images", "100", "--cache", "off", *flags]
    assert main([*command, "--attacks", "clean,pgd2", "--json", str(out)]) == 0
    record: dict[str, Any] = json.loads(out.read_text())["results"][0]
    return record


QUICK: dict[str, Any] = {"method": "madry", "steps": 1, "epochs": 1, "batch_size": 32, "val_size": 32}


def test_a_run_is_evaluated_at_its_own_size_and_threat_model(tmp_path: Path) -> None:
    keys = {**QUICK, "train_size": 320, "image_size": 16, "norm": "l2", "eps": 1.0, "eval_eps": 0.75}
    run = fastdynat.train("small", "digits", run_dir=tmp_path / "run", **keys)
    record = record_of_command(run.run_dir, tmp_path)
    expected = {a["attack"]: a["correct"] for a in record["attacks"]}
    attacks = {"attacks": "clean,pgd2", "num_images": 100}
    for model, data in ((run, None), (run, "digits"), (run.run_dir, "digits")):
        found = fastdynat.evaluate(model, data, **attacks)
        assert {name: measured.correct for name, measured in found.measurements.items()} == expected
        assert (found.norm, found.eps) == ("l2", 0.75)
    other = fastdynat.evaluate(run, attacks="clean", num_images=10, eps=0.5)
    assert (other.norm, other.eps) == ("l2", 0.5)
    other = fastdynat.evaluate(run, attacks="clean", num_images=10, norm="linf", eps=0.1)
    assert (other.norm, other.eps) == ("linf", 0.1)
    with pytest.raises(UserError, match="a radius under l2 does not apply to l1: norm='l1' needs eps"):
        fastdynat.evaluate(run, attacks="clean", norm="l1")
    with pytest.raises(UserError, match=r"was trained on digits .*\(1, 16, 16\)\), but .* \(1, 32, 32\)"):
        fastdynat.evaluate(run, own_test(), "clean")


def test_a_run_that_was_trained_against_several_norms(tmp_path: Path) -> None:
    keys = {**QUICK, "train_size": 64, "norms": "linf,l2", "norm_eps": "0.1,1.0"}
    run = fastdynat.train("small", "digits", run_dir=tmp_path / "run", **keys)
    assert run.about.eval_radii == {"linf": 0.1, "l2": 1.0}
    for eps in (None, 0.1):
        with pytest.raises(UserError, match="was trained against linf, l2; say which, such as norm='linf'"):
            fastdynat.evaluate(run, attacks="clean", eps=eps)
    assert fastdynat.evaluate(run, attacks="clean", num_images=10, norm="l2").eps == 1.0


def write_folder(folder: Path, classes: str) -> None:
    """Class folders of a few 16x16 images each, for training and test."""
    for name in classes:
        for split, count in (("train", 16), ("val", 4)):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.full((16, 16, 3), 8 * ord(name) % 256, np.uint8)
                pixels[number % 16] = 255
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")


def test_other_classes_than_those_of_the_run_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "abc", "abc")
    write_folder(tmp_path / "bc", "bc")
    write_folder(tmp_path / "abd", "abd")
    keys = {**QUICK, "batch_size": 8, "val_size": 8, "data_dir": str(tmp_path / "abc")}
    run = fastdynat.train("small", "imagefolder", run_dir=tmp_path / "run", **keys)
    same = fastdynat.evaluate(run, "imagefolder", "clean", data_dir=tmp_path / "abc")
    assert same.images == 12
    for model in (run, str(run.run_dir)):
        with pytest.raises(UserError, match=r"3 classes, .*but .* has 2 classes"):
            fastdynat.evaluate(model, "imagefolder", "clean", data_dir=tmp_path / "bc")
        with pytest.raises(UserError, match=r"whose class 2 is 'c', but in .* it is 'd'"):
            fastdynat.evaluate(model, "imagefolder", "clean", data_dir=tmp_path / "abd")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "attack object": ({"attacks": fastdynat.FGSM(own_net())}, "attacks must be names, .*, got FGSM"),
    "attack": ({"attacks": "pdg20"}, "unknown attack 'pdg20'"),
    "eps": ({"eps": 8}, r"eps must be a linf radius in \[0, 1\] pixel units"),
    "radius": ({"norm": "l2"}, "a radius under linf does not apply to l2: norm='l2' needs eps"),
    "output": ({"model": "small", "output": "out"}, "output='out' selects the logits of a torch.nn.Module"),
    "key": ({"batchsize": 8}, "unknown key 'batchsize'"),
    "transfer": ({"attacks": "transfer-pgd2"}, "needs two networks"),
    "labels": (
        {"data": (own_test()[0], own_test()[1] + 1)},
        "labels 0 to 10, but the network only 10 logits",
    ),
    "no data": ({"data": None}, "needs data"),
    "no test": ({"data": {"train": own_test()}}, "no 'test' in the dict"),
    "model": ({"model": 3}, "model must be a torch.nn.Module, a run or a name, got a int"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused(case: str) -> None:
    keys, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as caught:
        fastdynat.evaluate(**{"model": own_net(), "data": own_test(), "attacks": "clean", **keys})
    assert "\n" not in str(caught.value)
