"""`fastdynat export`: what others read is the run's network, and nothing is kept that is not."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import needs
from torch import Tensor, nn

from fastdynat.commands.evaluate.measurement_store import FORMAT
from fastdynat.commands.export.accuracies import Accuracies, stored_accuracies
from fastdynat.commands.export.export_check import largest_difference
from fastdynat.commands.export.export_config import ExportConfig
from fastdynat.commands.export.network_source import architecture_source
from fastdynat.commands.export.robustbench import Paper, check_keys, model_info
from fastdynat.commands.export.write_export import export_run
from fastdynat.commands.main import main
from fastdynat.errors import UserError
from fastdynat.evaluation import Measurement
from fastdynat.models import build_model
from fastdynat.runs import Sidecar, code_version, load_network, read_sidecar

TINY = [
    "--train-size",
    "40",
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


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    assert (
        main(
            [
                "train",
                "--run-dir",
                str(run),
                *TINY,
                "--normalize",
                "dataset",
                "--eps",
                "8/255",
                "--stop-after",
                "1",
            ]
        )
        == 0
    )
    return run


def weights_of(run: Path, checkpoint: str = "best") -> Path:
    return run / checkpoint / "model.safetensors"


def export(run: Path, out: Path, *flags: str) -> int:
    return main(["export", str(run), "--out", str(out), *flags])


@torch.no_grad()
def logits(run: Path, x: Tensor) -> Tensor:
    return load_network(weights_of(run))[0](x)


FRESH = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("architecture", sys.argv[1] + ".py")
module = importlib.util.module_from_spec(spec)
sys.modules["architecture"] = module
spec.loader.exec_module(module)
net = module.build()
stored = torch.load(sys.argv[1] + ".pt", weights_only=True)
net.load_state_dict(stored["state_dict"], strict=True)
x = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(net.eval()(x), sys.argv[3])
imported = {name.partition(".")[0] for name in sys.modules}
assert not imported & {"fastdynat", "torchvision", "timm"}, sorted(imported)
"""


def test_robustbench_files_need_only_torch(finished: Path, tmp_path: Path) -> None:
    stem, x, out = tmp_path / "Me2026Fast", tmp_path / "x.pt", tmp_path / "logits.pt"
    assert export(finished, stem.with_suffix(".pt")) == 0
    torch.save(torch.rand(3, *read_sidecar(weights_of(finished))[0].image_shape), x)
    done = subprocess.run(
        [sys.executable, "-c", FRESH, stem, x, out], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(out), logits(finished, torch.load(x)), rtol=1e-6, atol=1e-6)
    assert {path.name for path in tmp_path.iterdir()} == {
        *(f"Me2026Fast{s}" for s in (".pt", ".py", ".json")),
        x.name,
        out.name,
    }


@pytest.mark.parametrize(
    "name",
    [
        "small-gn",
        "resnet18",
        "resnet18_s1122",
        "PreAct_ResNet18-silu",
        "WRN_10_1",
        "resnet34",
        "torchvision:resnet18",
    ],
)
def test_the_source_is_the_architecture(name: str) -> None:
    about = {"num_classes": 7, "image_shape": (3, 16, 16), "mean": (0.1, 0.2, 0.3), "std": None}
    code = architecture_source(name, **about)  # type: ignore[arg-type]
    assert "fastdynat" not in "\n".join(line for line in code.splitlines() if "import" in line)
    namespace: dict[str, object] = {"__name__": "architecture"}
    exec(code, namespace)
    ours, theirs = build_model(name, **about), namespace["build"]()  # type: ignore[arg-type, operator]
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert torch.equal(theirs.normalize.mean, ours.normalize.mean)
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(theirs.eval()(x), ours.eval()(x))


@needs("timm")
def test_the_source_of_a_timm_network() -> None:
    code = architecture_source("timm:resnet10t", num_classes=3, image_shape=(1, 32, 32), mean=None, std=None)
    namespace: dict[str, object] = {"__name__": "architecture"}
    exec(code, namespace)
    assert namespace["build"]().eval()(torch.rand(2, 1, 32, 32)).shape == (2, 3)  # type: ignore[operator]
    assert "class" not in code.replace("num_classes", "").replace("class Normalize", "").replace(
        "class UserError", ""
    )


LOADER = """
import sys, torch
try:
    import autoattack
except ImportError:
    import pyautoattack, pyautoattack.state
    sys.modules.update({"autoattack": pyautoattack, "autoattack.state": pyautoattack.state})
from robustbench.utils import load_model, rm_substr_from_state_dict
from robustbench.model_zoo import model_dicts
from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
sys.path.insert(0, "models/cifar10/Linf")
import Me2026Fast
models = model_dicts[BenchmarkDataset("cifar10")][ThreatModel("Linf")]
models["Me2026Fast"] = {"model": Me2026Fast.build, "gdrive_id": "none: the file is there"}
state = torch.load("models/cifar10/Linf/Me2026Fast.pt")["state_dict"]
cut = rm_substr_from_state_dict(rm_substr_from_state_dict(state, "module."), "model.")
assert list(cut) == list(state)
net = load_model("Me2026Fast", model_dir="models", dataset="cifar10", threat_model="Linf")
with torch.no_grad():
    torch.save(net(torch.load("x.pt")), "logits.pt")
"""


@pytest.mark.peer
@needs("robustbench", "pkg_resources")  # which robustbench imports and setuptools 82 removed
def test_robustbenchs_own_loader(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models/cifar10/Linf"
    folder.mkdir(parents=True)
    assert export(finished, folder / "Me2026Fast.pt") == 0
    torch.save(torch.rand(3, *read_sidecar(weights_of(finished))[0].image_shape), tmp_path / "x.pt")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", LOADER], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    expected = logits(finished, torch.load(tmp_path / "x.pt"))
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-6, atol=1e-6)


def stored(
    run: Path, name: str, attack: str, accuracy: float, images: int, digest: str = "digest", **key: object
) -> None:
    """An evaluation as `fastdynat eval` stores it, as far as the export reads it."""
    sidecar, sha = read_sidecar(weights_of(run))
    about = {"dataset": sidecar.dataset, "norm": sidecar.norm, "eps": sidecar.eval_eps}
    about |= {name: key.pop(name) for name in about.keys() & key.keys()}
    labels, robust = torch.zeros(images, dtype=torch.int64), torch.arange(images) < round(accuracy * images)
    measured = Measurement.of(attack, robust, labels, classes=1, seconds=1.0, batch_size=images)
    document = {
        "format": FORMAT,
        "key": {"weights": sha, "attack": attack, "amp": "off", "images": f"{digest} {images}", **key},
        "about": about,
        "measurement": asdict(measured),
    }
    (run / "evaluations").mkdir(exist_ok=True)
    (run / "evaluations" / f"{name}.json").write_text(json.dumps(document))


def test_accuracies_are_the_stored_ones(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    flags = (
        "--authors",
        "A. Author",
        "--venue",
        "Unpublished",
        "--link",
        "https://example.org",
        "--name",
        "A title",
    )
    assert export(run, tmp_path / "A.pt", *flags, "--dataset", "cifar10") == 0
    info = json.loads((tmp_path / "A.json").read_text())
    assert (info["clean_acc"], info["autoattack_acc"], info["reported"]) == (None, None, None)
    assert "--attacks clean,fast-autoattack" in "".join(capsys.readouterr().err.split("\n"))
    assert (info["authors"], info["venue"], info["link"], info["name"]) == ("A. Author", *flags[3::2])
    assert (info["dataset"], info["eps"]) == ("cifar10", "8/255")

    stored(run, "a", "clean", 0.5, 100)
    stored(run, "b", "clean", 0.8125, 10_000)
    stored(run, "c", "fast-autoattack", 0.44, 10_000)
    stored(run, "d", "autoattack", 0.4567, 10_000)
    # None of these is this checkpoint under this threat, whole and in float32.
    stored(run, "e", "autoattack", 0.9, 20_000, weights="0" * 64)
    stored(run, "f", "autoattack", 0.9, 20_000, amp="bf16")
    stored(run, "g", "autoattack", 0.9, 20_000, shard="1/2")
    stored(run, "h", "autoattack", 0.9, 20_000, standing="ab")
    stored(run, "i", "autoattack", 0.9, 20_000, eps=0.5)
    stored(run, "j", "autoattack", 0.9, 20_000, source="ab")
    stored(run, "k", "clean", 0.9, 20_000, dataset="another")
    stored(run, "l", "autoattack", 0.9, 20_000)
    edited = run / "evaluations" / "l.json"
    edited.write_text(edited.read_text().replace('"accuracy": 0.9', '"accuracy": 0.95'))
    (run / "evaluations" / "broken.json").write_text("{")
    assert export(run, tmp_path / "A.pt", "--overwrite") == 0
    info = json.loads((tmp_path / "A.json").read_text())
    assert (info["clean_acc"], info["autoattack_acc"], info["reported"]) == ("81.25", "45.67", "45.67")
    assert "clean: 81.25 % of 10000 images; autoattack: 45.67 % of 10000 images" in capsys.readouterr().err
    (run / "evaluations" / "d.json").unlink()
    sidecar, sha = read_sidecar(weights_of(run))
    assert (
        stored_accuracies(
            run, sha, dataset=sidecar.dataset, norm=sidecar.norm, eps=sidecar.eval_eps
        ).autoattack
        == 0.44
    )


def accuracies_of(run: Path) -> Accuracies:
    sidecar, sha = read_sidecar(weights_of(run))
    return stored_accuracies(run, sha, dataset=sidecar.dataset, norm=sidecar.norm, eps=sidecar.eval_eps)


def test_both_accuracies_are_of_the_same_images(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    stored(run, "a", "clean", 0.9, 20_000)  # nothing else is of these images
    assert accuracies_of(run).clean == 0.9
    stored(run, "b", "clean", 0.8, 10_000)
    stored(run, "c", "fast-autoattack", 0.44, 10_000)
    stored(run, "d", "clean", 1.0, 50)
    stored(run, "e", "autoattack", 0.6, 50)
    stored(run, "f", "autoattack", 0.7, 10_000, digest="of another folder")
    found = accuracies_of(run)
    assert (found.clean, found.autoattack, found.images) == (0.8, 0.44, 10_000)
    assert found.note == (
        "clean: 80.00 % of 10000 images; fast-autoattack: 44.00 % of 10000 images; "
        "results on 3 other sets of images are left out"
    )
    info = model_info(
        read_sidecar(weights_of(run))[0], dataset="cifar10", paper=Paper(footnote="Ours."), accuracies=found
    )
    measured = "Ours. Accuracies on 10000 test images."
    assert info["footnote"] == f"{measured} AutoAttack by fastdynat's implementation."
    theirs = model_info(
        read_sidecar(weights_of(run))[0],
        dataset="cifar10",
        paper=Paper(footnote="Ours."),
        accuracies=replace(found, attack="autoattack"),
    )
    assert theirs["footnote"] == measured
    (run / "evaluations" / "c.json").unlink()
    (run / "evaluations" / "e.json").unlink()
    found = accuracies_of(run)  # no set has both: the one with the robust accuracy
    assert (found.clean, found.autoattack) == (None, 0.7)
    assert "the rest is null until" in found.note


def test_measurements_of_the_present_code_go_first(finished: Path, tmp_path: Path) -> None:
    for order in (("a", "b", "c"), ("c", "b", "a")):  # file names do not decide
        run = tmp_path / "".join(order)
        shutil.copytree(finished, run, symlinks=True)
        stored(run, "clean", "clean", 0.8, 1000)
        stored(run, order[0], "fast-autoattack", 0.40, 1000, version="0.0+old")
        stored(run, order[1], "fast-autoattack", 0.44, 1000, version=code_version(), seed=1)
        stored(run, order[2], "fast-autoattack", 0.43, 1000, version=code_version(), seed=2)
        assert accuracies_of(run).autoattack == 0.43  # no seed may hide what another one finds


@pytest.mark.parametrize(
    ("norm", "eps", "text"),
    [
        ("linf", 8 / 255, "8/255"),
        ("linf", 0.031, "0.031"),
        ("l2", 0.5, "0.5"),
        ("l2", 1.0, "1"),
        ("l1", 12.0, "12"),
    ],
)
def test_only_linf_radii_are_fractions(finished: Path, norm: str, eps: float, text: str) -> None:
    sidecar = replace(read_sidecar(weights_of(finished))[0], norm=norm, eval_eps=eps)
    nothing = Accuracies(None, None, None, None, "")
    info = model_info(sidecar, dataset="cifar10", paper=Paper(), accuracies=nothing)
    assert info["eps"] == text


def test_model_info_has_robustbenchs_fields(finished: Path) -> None:
    sidecar, sha = read_sidecar(weights_of(finished))
    nothing = stored_accuracies(finished, sha, dataset=sidecar.dataset, norm="linf", eps=1.0)
    info = model_info(sidecar, dataset="cifar10", paper=Paper(), accuracies=nothing)
    # Fields of robustbench's model_info files and its ModelInfo.
    fields = (
        "link name authors additional_data number_forward_passes dataset venue "
        "architecture eps clean_acc reported"
    )
    assert set(info) == {*fields.split(), "autoattack_acc", "footnote", "unreliable"}


@pytest.mark.parametrize(
    "kind", ["torch", pytest.param("onnx", marks=needs("onnx", "onnxscript", "onnxruntime"))]
)
def test_programs_run_without_this_library(
    finished: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / {"torch": "net.pt2", "onnx": "net.onnx"}[kind]
    assert export(finished, out, "--format", kind) == 0
    assert "its logits differ by at most" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    x = torch.rand(7, *read_sidecar(weights_of(finished))[0].image_shape)
    torch.testing.assert_close(load_program(out)(x), logits(finished, x), rtol=1e-4, atol=1e-5)


def load_program(path: Path) -> Callable[[Tensor], Tensor]:
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def test_a_difference_is_refused_and_nothing_is_kept(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (3, 8, 8)
    model = build_model("small", num_classes=10, image_shape=shape).eval().requires_grad_(False)
    scale = float(model(torch.rand(5, *shape)).abs().max())
    assert largest_difference(model, lambda x: model(x) + 1e-6 * scale, shape) < 1e-5 * scale
    for wrong in (lambda x: model(x) + 1e-3 * scale, lambda x: model(x) * torch.nan):
        with pytest.raises(UserError, match="logits differ"):
            largest_difference(model, wrong, shape)

    load = torch.export.load

    class Off(nn.Module):
        def __init__(self, program: nn.Module) -> None:
            super().__init__()
            self.program = program

        def module(self) -> Callable[[Tensor], Tensor]:
            return lambda x: self.program(x) * 1.01

    monkeypatch.setattr(torch.export, "load", lambda path: Off(load(path).module()))
    (tmp_path / "net.pt2").write_text("old")
    assert export(finished, tmp_path / "net.pt2", "--format", "torch", "--overwrite") == 2
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("net.pt2", "old")]


def test_keys_that_robustbench_would_cut() -> None:
    for key in ("net.model.conv.weight", "submodule.weight"):
        with pytest.raises(UserError, match="--format torch"):
            check_keys({key: torch.zeros(1)})
    check_keys({"net.models.weight": torch.zeros(1)})


def test_bad_input_is_refused_before_anything_is_written(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "A.pt"

    def message(run: Path = finished, **kwargs: object) -> str:
        with pytest.raises(UserError) as caught:
            export_run(run, ExportConfig(**{"out": str(out), **kwargs}))  # type: ignore[arg-type]
        return str(caught.value)

    assert "no run at" in message(tmp_path / "none")
    assert "must end in .onnx" in message(format="onnx")
    assert "Rice2020Overfitting" in message(out=str(tmp_path / "my-net.pt"))
    assert "cannot write" in message(out=str(tmp_path / "no/folder.pt"))
    assert list(tmp_path.iterdir()) == []
    out.with_suffix(".json").write_text("mine")
    assert "A.json exists" in message()
    assert [path.name for path in tmp_path.iterdir()] == ["A.json"]


def test_the_sidecar_is_enough_for_the_source(finished: Path) -> None:
    """The run was trained with --normalize dataset: mean and std of its data are in the source too."""
    sidecar: Sidecar = read_sidecar(weights_of(finished))[0]
    assert sidecar.mean is not None
    code = architecture_source(
        sidecar.architecture,
        num_classes=sidecar.num_classes,
        image_shape=sidecar.image_shape,
        mean=sidecar.mean,
        std=sidecar.std,
    )
    assert f"Normalize({sidecar.mean}, {sidecar.std})" in code
