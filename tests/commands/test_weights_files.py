"""Released weights files: `eval FILE --model NAME`, `export FILE --model NAME`; new networks' source."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fastdynat.commands.main import main
from fastdynat.data import RELEASED_PIXELS
from fastdynat.models import build_model, load_foreign

CIFAR = (3, 32, 32)
WIDE = {"init_conv": "conv1", "batchnorm": "bn1", "logits": "fc"}
BLOCK = {
    "batchnorm_0": "bn1",
    "batchnorm_1": "bn2",
    "conv_0": "conv1",
    "conv_1": "conv2",
    "shortcut": "convShortcut",
}


def released(path: Path, *, classes: int = 10) -> nn.Module:
    """A WRN of Gowal et al. with random weights, stored under DeepMind's names; our network of them."""
    mean, std = RELEASED_PIXELS["cifar10"]
    torch.manual_seed(2)
    model = build_model(
        "wrn-10-1-silu-same",
        num_classes=classes,
        image_shape=CIFAR,
        mean=mean,
        std=std,
    )
    state = {}
    for key, value in model.net.state_dict().items():  # type: ignore[union-attr]
        parts = key.split(".")
        if parts[0].startswith("block"):
            inner = next(old for old, new in BLOCK.items() if new == parts[3])
            parts = ["layer", str(int(parts[0][-1]) - 1), "block", parts[2], inner, *parts[4:]]
        else:
            parts[0] = next(old for old, new in WIDE.items() if new == parts[0])
        state[f"module.{'.'.join(parts)}"] = value
    torch.save({"model_state_dict": state, "epoch": 400}, path)
    return model.eval()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of 40 images of ten classes, with 32 pixels."""
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in range(10):
            folder = tmp_path / "images" / split / str(label)
            folder.mkdir(parents=True)
            for i in range(4):
                pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "images"


def refusal(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_released_file_is_evaluated(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions of the command are those of the network, counted by hand."""
    monkeypatch.chdir(tmp_path)
    model = released(tmp_path / "w.pt")
    model.normalize.mean.zero_()  # type: ignore[union-attr,operator]
    model.normalize.std.fill_(1)  # type: ignore[union-attr,operator]
    flags = ["--data", "imagefolder", "--data-dir", images, "--image-size", 32, "--attacks", "clean,fgsm"]
    argv = ["eval", "w.pt", "--model", "wrn-10-1-silu-same", *flags, "--json", "e.json", "--quiet"]
    assert main([str(word) for word in argv]) == 0
    (row,) = json.loads((tmp_path / "e.json").read_text())["results"]
    assert row["architecture"] == "wrn-10-1-silu-same"
    correct = 0
    for file in sorted((images / "test").rglob("*.png")):
        x = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None].float() / 255
        correct += int(model(x).argmax()) == int(file.parent.name)
    assert row["attacks"][0]["accuracy"] == pytest.approx(correct / 40)


def test_refusals(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, data = tmp_path / "w.pt", ["--data", "imagefolder", "--data-dir", images, "--image-size", 32]
    released(file)
    released(tmp_path / "seven.pt", classes=7)
    assert "does not name its network; give --model" in refusal(capsys, "eval", file, *data)
    assert "give --data" in refusal(capsys, "eval", file, "--model", "wrn-10-1")
    line = refusal(capsys, "eval", file, "--model", "wrn-10-2-same", *data)
    assert "of other shapes (net.block1.layer.0.conv1.weight is (16, 16, 3, 3) there, (32," in line
    assert "did you mean" in refusal(capsys, "eval", file, "--model", "wrn28", *data)
    line = refusal(capsys, "eval", tmp_path / "seven.pt", "--model", "wrn-10-1-same", *data)
    assert "is for 7 classes, but the data has 10" in line
    assert "no weights at" in refusal(capsys, "eval", tmp_path / "no.pt", "--model", "small", *data)
    assert "is not; leave it out" in refusal(capsys, "eval", tmp_path, "--model", "small")
    assert "leave it out" in refusal(capsys, "eval", file, "--normalize", "dataset", *data)
    out = ["--out", tmp_path / "Net.pt"]
    assert "does not name its network; give --model" in refusal(capsys, "export", file, *out)
    assert "does not name its data set; give --dataset" in refusal(
        capsys, "export", file, "--model", "wrn-10-1-same", *out
    )
    assert not (tmp_path / "Net.pt").exists()


def run_source(path: Path) -> tuple[dict[str, Any], nn.Module]:
    namespace: dict[str, Any] = {"__name__": path.stem}
    exec(compile(path.with_suffix(".py").read_text(), str(path), "exec"), namespace)
    network = namespace["build"]()
    network.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    return namespace, network.eval()


@torch.no_grad()
def test_a_released_file_is_exported_for_robustbench(tmp_path: Path) -> None:
    model = released(tmp_path / "w.pt")
    argv = [
        "export",
        "w.pt",
        "--model",
        "wrn-10-1-silu-same",
        "--dataset",
        "cifar10",
        "--normalize",
        "released",
    ]
    argv[1] = str(tmp_path / "w.pt")
    assert main([*argv, "--out", str(tmp_path / "Gowal2020.pt")]) == 0
    _, network = run_source(tmp_path / "Gowal2020.pt")
    x = torch.rand(3, *CIFAR)
    torch.testing.assert_close(network(x), model(x), rtol=1e-5, atol=1e-6)
    about = json.loads((tmp_path / "Gowal2020.json").read_text())
    assert (about["eps"], about["architecture"], about["dataset"]) == (
        "8/255",
        "wrn-10-1-silu-same",
        "cifar10",
    )


ARCHITECTURES = [
    "preact_resnet34",
    "preact_resnet18_s2222",
    "preact_resnet18-silu-same",
    "preact_resnet18-raw",
    "rawrn-70-16",
    "raresnet-50",
    "convnext-atto-cvst",
    "vit-ti-cvst",
    "convnext-iso-ti-cvst",
    "timm:vit_tiny_patch16_224",
    "timm:efficientnet_b0",
]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_source_of_new_networks_stands_alone(name: str) -> None:
    from fastdynat.commands.export.network_source import architecture_source

    pytest.importorskip("timm")
    code = architecture_source(name, num_classes=7, image_shape=(3, 64, 64), mean=None, std=None)
    assert "import fastdynat" not in code
    assert "from fastdynat" not in code
    namespace: dict[str, Any] = {"__name__": "net"}
    with torch.device("meta"):
        exec(compile(code, "net.py", "exec"), namespace)
        mine: dict[str, Tensor] = namespace["build"]().state_dict()
        ours = build_model(name, num_classes=7, image_shape=(3, 64, 64)).state_dict()
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in ours.items()}


def test_weights_beside_a_network_by_name_still_load(tmp_path: Path) -> None:
    """`eval torchvision:NAME --weights FILE` and `eval FILE --model torchvision:NAME` predict alike."""
    from fastdynat.models.foreign import load_weights_file

    net = build_model("torchvision:mobilenet_v3_small", num_classes=4, image_shape=(3, 64, 64)).net
    torch.save(net.state_dict(), tmp_path / "w.pt")
    fits: dict[str, Any] = {"num_classes": 4, "image_shape": (3, 64, 64)}
    one = load_foreign("torchvision:mobilenet_v3_small", weights=tmp_path / "w.pt", **fits)
    other = load_weights_file(tmp_path / "w.pt", "torchvision:mobilenet_v3_small", **fits)
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(one.model(x), other.model(x))
