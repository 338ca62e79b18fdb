"""Foreign networks: names, the user's own code, wrapped state dicts, and clear errors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import available, needs
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.networks import tiny_cnn
from torch import Tensor, nn

from fastdynat.errors import UserError
from fastdynat.models import build_model, load_foreign
from fastdynat.models.foreign import load_weights_file
from fastdynat.models.state_files import put_published_state, read_state_dict

SHAPE = (3, 8, 8)
X = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(5))
FITS = {"num_classes": 10, "image_shape": SHAPE}
NET = """
import torch
from torch import nn

def linear(num_classes=7, image_shape=(1, 2, 2)):
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(image_shape).numel(), num_classes))

def softmax():
    return nn.Sequential(linear(10, (3, 8, 8)), nn.Softmax(1))

def demanding(width): return nn.Identity()
def failing(): raise KeyError("weights.pth")
def number(): return 3
def scalar(): return nn.Flatten(0)
ready = linear(10, (3, 8, 8))
constant = 4

class NotANumber(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :10].sum(1, keepdim=True) * torch.tensor([float("nan")] + 9 * [1.0])
"""


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of callables, in the current directory under a name that no test shares."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"net_{tmp_path.name.replace('-', '_')}.py"
    path.write_text(NET)
    return path


def refused(name: str, **kwargs: object) -> str:
    with pytest.raises(UserError) as caught:
        load_foreign(name, **{**FITS, **kwargs})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("spelt", ["{stem}:linear", "{path}:linear", "{path.name}:linear"])
def test_a_callable_of_a_module_or_a_file(net: Path, spelt: str) -> None:
    before = list(sys.path)
    found = load_foreign(spelt.format(stem=net.stem, path=net), **FITS)
    assert sys.path == before
    assert found.note == ""
    assert not found.model.training
    torch.manual_seed(3)
    layer = nn.Linear(3 * 8 * 8, 10)
    assert torch.equal(found.model(X), layer(X.flatten(1)))


def test_arguments_are_those_that_the_signature_takes_and_that_are_known(net: Path) -> None:
    assert load_foreign(f"{net.stem}:linear").model(torch.zeros(2, 1, 2, 2)).shape == (2, 7)
    assert load_foreign(f"{net.stem}:ready", **FITS).model(X).shape == (4, 10)
    assert "called with no arguments" in refused(f"{net.stem}:demanding")


def test_a_file_imports_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "my_layers_of_foreign.py").write_text("from torch import nn\nclass Net(nn.Flatten): pass\n")
    (tmp_path / "entry.py").write_text("from my_layers_of_foreign import Net\n")
    assert load_foreign(f"{tmp_path / 'entry.py'}:Net").model(X).shape == (4, 192)


@pytest.mark.parametrize(
    ("attribute", "says"),
    [
        ("failing", ["KeyError: 'weights.pth'", ".py:13)"]),
        ("number", ["makes a int, not a torch.nn.Module"]),
        ("constant", ["is a int"]),
        ("nothing", ["has no 'nothing'"]),
        ("scalar", ["(384,)", "(2, 10)"]),
    ],
)
def test_what_is_wrong_with_a_callable_is_said(net: Path, attribute: str, says: list[str]) -> None:
    message = refused(f"{net.name}:{attribute}")
    assert all(text in message for text in says), message


def test_what_is_wrong_with_a_module_is_said(net: Path) -> None:
    for text, says in (
        ("import nowhere_to_be_found", "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("x = 1\ndef f(:\n", ":2)"),
        ("import sys\nsys.exit('usage: train.py')", "SystemExit: usage: train.py"),
    ):
        net.write_text(text)
        assert says in refused(f"{net.name}:f")
    assert "no module 'torchvison'" in refused("torchvison:resnet18")
    assert "no_such.py" in refused("no_such.py:f")
    for name in ("resnet18", "torchvision:", ":f"):
        assert "give robustbench:NAME" in refused(name)


def test_images_and_classes_that_do_not_fit(net: Path) -> None:
    assert "2x8x8 images" in refused(f"{net.name}:ready", image_shape=(2, 8, 8))
    assert "(2, 11)" in refused(f"{net.name}:ready", num_classes=11)


def test_probabilities_are_noticed(net: Path) -> None:
    assert "probabilities" in load_foreign(f"{net.name}:softmax", **FITS).note


def test_the_digest_follows_weights_name_and_code(net: Path) -> None:
    def digest(attribute: str) -> str:
        return load_foreign(f"{net.name}:{attribute}", **FITS).sha256

    linear = digest("linear")
    assert linear == digest("linear")
    assert linear != digest("ready")
    net.write_text(NET.replace("manual_seed(3)", "manual_seed(4)"))
    other = digest("linear")
    # The same weights behind other code.
    net.write_text(NET.replace("manual_seed(3)", "manual_seed(4)") + "\nlinear = lambda: ready\n")
    assert len({linear, other, digest("linear")}) == 3


def test_a_weights_file_behind_other_code_is_another_network(net: Path, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file({"1.weight": torch.zeros(10, 192), "1.bias": torch.zeros(10)}, file)

    def digest() -> str:
        return load_weights_file(file, f"{net.name}:linear", **FITS).sha256  # type: ignore[arg-type]

    before = digest()
    assert digest() == before
    net.write_text(NET.replace("nn.Flatten(), nn.Linear(torch", "nn.Flatten(), nn.Linear(1 * torch"))
    assert digest() != before


class Holder(nn.Module):
    """A network whose own keys look like wrappers': model.0.weight, and net.module.weight inside."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
        self.net = nn.Module()
        self.net.module = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


@given(wrapper=st.lists(st.sampled_from(["module.", "_orig_mod.", "model."]), max_size=3).map("".join))
def test_wrappers_go_from_the_front_only(wrapper: str) -> None:
    trained, empty = Holder(), Holder()
    state = {wrapper + key: value for key, value in trained.state_dict().items()}
    loaded = put_published_state(empty, state, Path("w")).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in trained.state_dict().items())


@pytest.mark.parametrize("holder", [None, "state_dict", "model"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_from_a_file(net: Path, tmp_path: Path, suffix: str, holder: str | None) -> None:
    layer = nn.Linear(192, 10)
    state = {f"module.1.{key}": value.detach() for key, value in layer.state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(state if holder is None else {holder: state, "epoch": 3}, path)
    else:
        save_file(state, path)
    found = load_foreign(f"{net.name}:linear", weights=path, **FITS)
    assert torch.equal(found.model(X), layer(X.flatten(1)))


def test_weights_of_this_library_bring_their_normalisation(tmp_path: Path) -> None:
    trained = build_model("torchvision:resnet18", **FITS, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)).eval()
    save_file(dict(trained.state_dict()), tmp_path / "model.safetensors")
    found = load_foreign("torchvision:resnet18", weights=tmp_path / "model.safetensors", **FITS)
    assert torch.equal(found.model(X), trained(X))


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"

    def message(content: bytes | object) -> str:
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(UserError) as caught:
            read_state_dict(path)
        return str(caught.value)

    assert "web page" in message(b"<!DOCTYPE html>")
    assert "is truncated or not a weights file" in message(b"PK\x03\x04 cut off")
    assert "is truncated or not a weights file" in message(b"")
    assert "more than tensors" in message(tiny_cnn())
    assert "no state dict" in message({"epoch": 3})
    with pytest.raises(UserError, match="cannot read"):
        read_state_dict(tmp_path / "absent.pt")
    (tmp_path / "w.safetensors").write_bytes(b"1234")
    with pytest.raises(UserError, match="damaged"):
        read_state_dict(tmp_path / "w.safetensors")


def test_keys_that_are_missing_or_too_many_are_named() -> None:
    state = dict(tiny_cnn().state_dict())
    state["extra.bias"] = state.pop("6.bias")
    state.pop("1.num_batches_tracked")  # predicts nothing
    with pytest.raises(UserError, match=r"1 keys missing \(6.bias\), 1 keys unexpected \(extra.bias\)"):
        put_published_state(tiny_cnn(), state, Path("w.pt"))
    with pytest.raises(UserError, match=r"size mismatch for 6\.weight"):
        put_published_state(tiny_cnn(), dict(tiny_cnn(classes=4).state_dict()), Path("w.pt"))
    with pytest.raises(UserError, match="two networks"):
        put_published_state(
            tiny_cnn(), {**tiny_cnn().state_dict(), "module.6.bias": torch.zeros(10)}, Path("w.pt")
        )


def test_torchvisions_weights_stand_behind_their_normalisation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    theirs = torchvision.models.resnet18(num_classes=1000)
    # The file that a download leaves in torch.hub's folder.
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    weights = torchvision.models.ResNet18_Weights.DEFAULT
    (tmp_path / "checkpoints").mkdir()
    torch.save(theirs.state_dict(), tmp_path / "checkpoints" / Path(weights.url).name)
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda *args, **kwargs: pytest.fail("no network in tests")
    )
    found = load_foreign("torchvision:resnet18", num_classes=1000, image_shape=(3, 32, 32))
    x = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert torch.equal(found.model(x), theirs.eval()((x - mean) / std))
    assert "mean (0.485, 0.456, 0.406)" in found.note
    assert "(2, 1000)" in refused("torchvision:resnet18", image_shape=(3, 32, 32))


def test_a_download_that_fails_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    message = refused("torchvision:resnet18")
    assert "network" in message
    assert "--weights FILE" in message
    assert "Name or service not known" in message


def test_unknown_names_and_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "did you mean 'resnet18'" in refused("torchvision:resnet81")
    if not available("robustbench"):
        assert "pip install robustbench" in refused("robustbench:Rice2020Overfitting")
    with pytest.raises(UserError, match="needs num_classes and image_shape"):
        load_foreign("torchvision:resnet18", weights=Path("w.pt"))


@needs("timm")
def test_timms_weights_stand_behind_their_normalisation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    torch.manual_seed(1)
    theirs = timm.create_model("resnet10t")
    create = timm.create_model

    def from_a_file(name: str, *, pretrained: bool) -> nn.Module:
        assert pretrained
        net = create(name)
        net.load_state_dict(theirs.state_dict())
        return net

    monkeypatch.setattr(timm, "create_model", from_a_file)
    found = load_foreign("timm:resnet10t", num_classes=1000, image_shape=(3, 64, 64))
    config = theirs.pretrained_cfg
    x = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    assert torch.equal(found.model(x), theirs.eval()((x - mean) / std))
    assert f"mean {tuple(config['mean'])}" in found.note


@needs("timm")
def test_timm_names_and_weights(tmp_path: Path) -> None:
    import timm

    assert "unknown timm model" in refused("timm:resnet10tt")
    theirs = timm.create_model("resnet10t", num_classes=10).eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "w.pth")
    found = load_foreign(
        "timm:resnet10t", num_classes=10, image_shape=(3, 32, 32), weights=tmp_path / "w.pth"
    )
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(found.model(x), theirs(x))


ROBUSTBENCH = """
import importlib.util, sys, torch
from pathlib import Path
from fastdynat.errors import UserError
from fastdynat.models import load_foreign
shape = (3, 32, 32)
for name in ("robustbench:Rice2020Overfiting", "robustbench:X:cifar11", "robustbench:X:cifar10:L7"):
    try:
        load_foreign(name, num_classes=10, image_shape=shape)
    except UserError as error:
        print(error)
from robustbench.model_zoo import model_dicts
from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
make = model_dicts[BenchmarkDataset("cifar10")][ThreatModel("Linf")]["Wong2020Fast"]["model"]
theirs = make().eval()
Path("models/cifar10/Linf").mkdir(parents=True)
torch.save(theirs.state_dict(), "models/cifar10/Linf/Wong2020Fast.pt")
torch.save(theirs.state_dict(), "w.pt")
x = torch.rand(2, *shape)
for weights in (None, Path("w.pt")):
    found = load_foreign("robustbench:Wong2020Fast", num_classes=10, image_shape=shape, weights=weights)
    assert torch.equal(found.model(x), theirs(x))
assert "autoattack" not in sys.modules or sys.modules["autoattack"].__name__ == "autoattack"
assert "pkg_resources" not in sys.modules or importlib.util.find_spec("pkg_resources")
import robustbench.loaders
found = Path(robustbench.loaders.pkg_resources.resource_filename("robustbench.loaders", "helper_files"))
assert found == Path(robustbench.loaders.__file__).parent / "helper_files"
"""


@pytest.mark.peer
@needs("robustbench")
def test_robustbenchs_own_models(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", ROBUSTBENCH], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "'Rice2020Overfitting'" in lines[0]
    assert "cifar11" in lines[1]
    assert "L7" in lines[2]


def test_a_network_that_answers_nan_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    with pytest.raises(UserError, match="answers two random 3x8x8 images with NaN"):
        load_foreign(f"{tmp_path / 'net.py'}:NotANumber", **FITS)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_weights_of_another_kind_of_number_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    network = nn.Linear(3, 2)
    before = network.weight.clone()
    torch.save(
        {key: (100 * value).to(dtype) for key, value in network.state_dict().items()}, tmp_path / "w.pt"
    )
    with pytest.raises(UserError, match=f"weight is {dtype}, the network's is torch.float32"):
        put_published_state(network, read_state_dict(tmp_path / "w.pt"), tmp_path / "w.pt")
    assert torch.equal(network.weight, before)
    put_published_state(
        network, {key: value.half() for key, value in network.state_dict().items()}, tmp_path / "w.pt"
    )
