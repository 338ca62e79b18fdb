"""--init-from: runs, files, libraries, the hub; a new last layer; refusals; resume; several processes."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import needs
from safetensors.torch import load_file, save_file
from support.ranks import RankPool
from support.same_run import assert_same_run
from torch import Tensor, nn

import fastdynat
from fastdynat.commands.main import main
from fastdynat.config import ModelConfig, to_flat
from fastdynat.data import dataset_info
from fastdynat.errors import UserError
from fastdynat.methods.configs import stored_config
from fastdynat.models import build_model, load_foreign
from fastdynat.models.initial_state import put_initial_state
from fastdynat.models.state_files import read_state_dict
from fastdynat.runs import load_network, read_sidecar
from fastdynat.training.frozen_parts import FrozenParts
from fastdynat.training.initial_weights import find_initial, put_initial_weights
from fastdynat.training.parts import open_split

TINY = ["--train-size", "64", "--val-size", "20", "--batch-size", "32", "--steps", "2", "--quiet"]
TINY += ["--device", "cpu"]
STILL = ["--epochs", "1", "--lr", "1e-30", "--weight-decay", "0", "--momentum", "0"]  # moves no weight
DIGITS = (1, 8, 8)
PARITY = """
import torch
from sklearn.datasets import load_digits

def parity():
    found = load_digits()
    images = torch.tensor(found.images * 255 / 16).round().to(torch.uint8)[:, None]
    labels = torch.tensor(found.target % 2)
    return {"train": (images[:1400], labels[:1400]), "test": (images[1400:], labels[1400:])}

def shuffled():
    return {**parity(), "class_names": None}
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs whose pixels are normalised; its best checkpoint may be the first."""
    run = tmp_path_factory.mktemp("source") / "run"
    argv = ["train", "--method", "natural", "--normalize", "dataset", "--run-dir", str(run), *TINY]
    assert main([*argv, "--epochs", "2"]) == 0
    return run


def train(run: Path, *flags: object, method: str = "madry", code: int = 0) -> Path:
    assert main(["train", "--method", method, "--run-dir", str(run), *TINY, *map(str, flags)]) == code
    return run


def refusal(capsys: pytest.CaptureFixture[str], run: Path, *flags: object) -> str:
    capsys.readouterr()
    train(run, *flags, code=2)
    assert not run.exists()
    return capsys.readouterr().err.strip().splitlines()[-1]


def weights(run: Path, name: str = "model") -> dict[str, Tensor]:
    return load_file(run / "last" / f"{name}.safetensors")


def fresh(seed: int, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return build_model(**options).state_dict()


@pytest.mark.parametrize("spelt", ["{run}", "{run}/best/model.safetensors"])
def test_a_run_starts_from_the_best_checkpoint_of_another(spelt: str, source: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "run", "--init-from", spelt.format(run=source), *STILL)
    given, kept = load_file(source / "best" / "model.safetensors"), weights(run)
    same = {key for key in given if torch.equal(given[key], kept[key])}
    assert {key for key in given if "running" not in key and "tracked" not in key} <= same
    flat = to_flat(stored_config(run))
    file = source / "best" / "model.safetensors"
    assert flat["init_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert flat["init_from"] == str(Path(spelt.format(run=source)).absolute())
    about = read_sidecar(run / "last" / "model.safetensors")[0]
    info = dataset_info("digits")
    assert info is not None
    assert about.mean == pytest.approx(info.mean)
    assert about.std == pytest.approx(info.std)
    network, _ = load_network(run / "last" / "model.safetensors")
    assert torch.equal(network.normalize.mean, given["normalize.mean"])


@pytest.mark.parametrize(
    ("flags", "warns"),
    [
        (["--seed", "2", "--val-size", "200"], True),
        (["--seed", "1"], False),
        (["--val-size", "200"], True),
        (["--val-size", "10"], False),  # some of the images that the run held out
    ],
)
def test_validation_images_that_the_weights_have_seen_are_told_of(
    flags: list[str], warns: bool, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", "fastdynat"):
        train(tmp_path / "run", "--init-from", source / "best" / "model.safetensors", *STILL, *flags)
    said = [r.getMessage() for r in caplog.records if "validation images are among" in r.getMessage()]
    # The images that both runs open.
    theirs, ours = (open_split(stored_config(run)) for run in (source, tmp_path / "run"))
    both = {*theirs.train.tolist()} & {*ours.val.tolist()}
    assert (bool(both), len(said)) == (warns, warns)
    assert all(f": {len(both)} of the {len(ours.val)} validation images" in text for text in said)


def test_the_message_names_checkpoint_and_digest(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "fastdynat"):
        train(tmp_path / "run", "--init-from", source, *STILL)
    epoch = read_sidecar(source / "best" / "model.safetensors")[0].epoch
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("model initialised from")]
    assert f"(best checkpoint, epoch {epoch}): small trained by natural on digits, sha256 " in line
    assert "freshly" not in line


def test_the_architecture_comes_with_the_weights(source: Path, tmp_path: Path) -> None:
    silu = train(tmp_path / "silu", "--model", "small-silu", *STILL)
    run = train(tmp_path / "run", "--init-from", silu, *STILL)
    assert to_flat(stored_config(run))["model"] == "small-silu"


def test_other_classes_get_a_last_layer_from_the_seed(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mine.py").write_text(PARITY)
    flags = ["--data", f"{tmp_path}/mine.py:parity", "--eps", "0.1", "--init-from", source, "--seed", "11"]
    with caplog.at_level("INFO", "fastdynat"):
        run = train(tmp_path / "run", *flags, *STILL)
    assert "; last layer net.linear reinitialised (10 to 2 classes)" in caplog.text
    given, kept = load_file(source / "best" / "model.safetensors"), weights(run)
    drawn = fresh(11, name="small", num_classes=2, image_shape=DIGITS)
    for key in given:
        if "running" not in key and "tracked" not in key:
            assert torch.equal(kept[key], (drawn if key.startswith("net.linear") else given)[key]), key
    assert main(["eval", str(run), "--attacks", "clean"]) == 0


def test_as_many_other_classes_are_other_classes() -> None:
    model = build_model("small", num_classes=4, image_shape=DIGITS)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = fresh(2, name="small", num_classes=4, image_shape=DIGITS)
    placed = put_initial_state(model, state, "w", num_classes=4, other_classes=True)
    assert placed.head == ("net.linear.weight", "net.linear.bias")
    for key, value in model.state_dict().items():
        assert torch.equal(value, (before if key in placed.head else state)[key])


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "module.net.", "net."])
@pytest.mark.parametrize("form", ["pt", "state_dict", "safetensors"])
def test_files_of_others(prefix: str, form: str, tmp_path: Path) -> None:
    """Bare networks under the usual wrappers, with and without our normalisation in front."""
    theirs = build_model("small", num_classes=10, image_shape=DIGITS).net
    for parameter in theirs.buffers():
        parameter.data = torch.rand_like(parameter.float()).to(parameter.dtype)
    state = {f"{prefix}{key}": value for key, value in theirs.state_dict().items()}
    file = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    save_file(state, file) if form == "safetensors" else torch.save(
        {"state_dict": state, "epoch": 3} if form == "state_dict" else state, file
    )
    model = build_model("small", num_classes=10, image_shape=DIGITS)
    placed = put_initial_state(model, read_state_dict(file), "w", num_classes=10)
    assert placed == type(placed)((), None)
    x = torch.rand(3, *DIGITS)
    assert torch.equal(model.eval()(x), theirs.eval()(x))


def test_a_file_whose_network_is_not_said(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "w.safetensors"
    shutil.copy(source / "best" / "model.safetensors", file)
    assert "does not name its network; give --model" in refusal(capsys, tmp_path / "run", "--init-from", file)
    run = train(tmp_path / "run", "--init-from", file, "--model", "small", *STILL)
    assert torch.equal(weights(run)["normalize.mean"], load_file(file)["normalize.mean"])


def test_shapes_that_do_not_fit_are_listed(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = fresh(0, name="wrn-10-3", num_classes=10, image_shape=DIGITS)
    torch.save(theirs, tmp_path / "w.pt")
    line = refusal(capsys, tmp_path / "run", "--init-from", tmp_path / "w.pt", "--model", "wrn-10-2")
    ours = fresh(0, name="wrn-10-2", num_classes=10, image_shape=DIGITS)
    differing = [key for key in theirs if ours[key].shape != theirs[key].shape]
    assert f"w.pt does not fit the network: {len(differing)} of other shapes (" in line
    for key in differing[:3]:
        assert f"{key} is {tuple(theirs[key].shape)} there, {tuple(ours[key].shape)} in the network" in line
    assert f" and {len(differing) - 3} more)" in line
    line = refusal(capsys, tmp_path / "run", "--init-from", source, "--model", "wrn-10-1")
    assert "39 keys missing (net.conv1.weight" in line
    assert "22 keys unexpected (net.features.0.weight" in line


def test_nothing_is_copied_where_something_does_not_fit() -> None:
    model = build_model("wrn-10-1", num_classes=10, image_shape=DIGITS)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = fresh(1, name="wrn-10-1", num_classes=10, image_shape=DIGITS)
    state["net.block3.layer.0.conv2.weight"] = state["net.block3.layer.0.conv2.weight"][:, :-1]
    with pytest.raises(
        UserError, match=r"1 of other shapes \(net.block3.layer.0.conv2.weight is \(64, 63, 3"
    ):
        put_initial_state(model, state, "w", num_classes=10)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--init-from", "RUN", "--model", "small-silu"], "holds another network; leave --model out"),
        (["--init-from", "RUN", "--normalize", "dataset"], "brings its own mean and std; leave it out"),
        (["--init-from", "RUN", "--init-sha256", "00"], ", not 00: the weights have changed"),
        (["--init-sha256", "00"], "--init-sha256 has no effect: needs --init-from"),
        (
            ["--init-from", "timm"],
            "--model small is not one of its networks; name one with --model timm:NAME",
        ),
        (
            ["--init-from", "torchvision", "--model", "timm:resnet18"],
            "name one with --model torchvision:NAME",
        ),
        (["--init-from", "no/such"], "no/such does not exist; give a weights file or a run directory"),
        (["--init-from", "robustbench:Wong2020Fast"], "--init-from that file, with --model"),
        (["--init-from", "NOISE", "--model", "small"], "noise.pt is truncated or not a weights file"),
        (["--init-from", "NAN", "--model", "small"], "values of net.linear.bias are NaN"),
        (["--init-from", "INT", "--model", "small"], "it was quantised or belongs to another network"),
        (["--init-from", "RUN", "--freeze", "*", "--epochs", "1"], "matches all 14 parameters"),
        (["--init-from", "timm", "--model", "timm:resnet10t"], "take RGB images, digits has 1 channel"),
    ],
)
def test_refusals(
    flags: list[str], message: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = fresh(0, name="small", num_classes=10, image_shape=DIGITS)
    torch.save({**state, "net.linear.bias": torch.full((10,), torch.nan)}, tmp_path / "nan.pt")
    torch.save({**state, "net.linear.bias": torch.ones(10, dtype=torch.int64)}, tmp_path / "int.pt")
    (tmp_path / "noise.pt").write_bytes(b"PK\x03\x04 nothing")
    places = {"RUN": source, **{name: tmp_path / f"{name.lower()}.pt" for name in ("NOISE", "NAN", "INT")}}
    line = refusal(capsys, tmp_path / "run", *(places.get(flag, flag) for flag in flags))
    assert message in line


def test_a_source_is_not_overwritten(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", "--init-from", str(source), "--run-dir", str(source), "--overwrite", *TINY]
    assert main(argv) == 2
    assert "--init-from" in capsys.readouterr().err
    assert (source / "best" / "model.safetensors").exists()


@pytest.mark.parametrize("method", ["trades", "dynat"])
def test_resume_is_bitwise_and_needs_the_source_no_more(method: str, source: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(source, tmp_path / "source", symlinks=True))
    (tmp_path / "mine.py").write_text(PARITY)
    flags = ["--data", f"{tmp_path}/mine.py:parity", "--eps", "0.1", "--init-from", copied, "--epochs", "3"]
    flags += ["--awp", "0.005", "--ema", "0.9", "--freeze", "features.[01].*", "--attack-bn", "train"]
    flags += ["--optimizers", "joint"]
    whole = train(tmp_path / "whole", *flags, method=method)
    parts = train(tmp_path / "parts", *flags, "--stop-after", "1", method=method)
    shutil.rmtree(copied)
    assert main(["train", "--resume", str(parts), "--quiet"]) == 0
    assert_same_run(whole, parts)


def test_a_run_without_a_checkpoint_takes_the_same_weights_again(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--init-from", tmp_path / "w.safetensors", "--model", "small", "--epochs", "1"]
    shutil.copy(source / "best" / "model.safetensors", tmp_path / "w.safetensors")
    whole = train(tmp_path / "whole", *flags)
    begun = train(tmp_path / "begun", *flags)
    for name in ("checkpoints", "last", "best", "metrics.jsonl", "metrics.csv"):
        path = begun / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    assert main(["train", "--resume", str(begun), "--quiet"]) == 0
    assert_same_run(whole, begun)
    shutil.rmtree(begun / "checkpoints")
    for name in ("last", "best", "metrics.jsonl", "metrics.csv"):
        (begun / name).unlink()
    state = load_file(tmp_path / "w.safetensors")
    save_file({**state, "net.linear.bias": state["net.linear.bias"] + 1}, tmp_path / "w.safetensors")
    capsys.readouterr()
    assert main(["train", "--resume", str(begun), "--quiet"]) == 2
    assert "the weights have changed" in capsys.readouterr().err


def test_a_run_keeps_its_source(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path / "run", "--init-from", source, *STILL)
    for flag, value in (("--init-from", "other"), ("--freeze", "net.linear.*")):
        assert main(["train", "--resume", str(run), flag, value]) == 2
        assert f"{flag[2:].replace('-', '_')} is " in capsys.readouterr().err


def test_the_model_of_a_guided_method_and_its_guide(source: Path, tmp_path: Path) -> None:
    """The guide is drawn as without --init-from: reading weights draws nothing from the run's stream."""
    plain = train(tmp_path / "plain", *STILL, method="dynat")
    run = train(tmp_path / "run", "--init-from", source, *STILL, method="dynat")
    given = load_file(source / "best" / "model.safetensors")
    assert torch.equal(weights(run)["net.linear.weight"], given["net.linear.weight"])
    ours, theirs = weights(plain, "guide"), weights(run, "guide")
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


def test_from_python(source: Path, tmp_path: Path) -> None:
    network, _ = load_network(source)
    module = nn.Sequential(network.net)
    torch.save({f"0.{k}": v for k, v in network.net.state_dict().items()}, tmp_path / "w.pt")
    images, labels = torch.randint(0, 256, (64, *DIGITS), dtype=torch.uint8), torch.arange(64) % 10
    run = fastdynat.train(
        nn.Sequential(build_model("small", num_classes=10, image_shape=DIGITS).net),
        (images, labels),
        method="natural",
        init_from=str(tmp_path / "w.pt"),
        lr=1e-30,
        weight_decay=0.0,
        epochs=1,
        batch_size=32,
        val_size=20,
        run_dir=tmp_path / "run",
        quiet=True,
    )
    assert torch.equal(run.model.state_dict()["0.linear.weight"].cpu(), module[0].linear.weight)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Callable[[], nn.Module]:
    """timm with weights from memory in place of the hub."""
    import timm

    create, state = timm.create_model, {}

    def create_model(name: str, *, pretrained: bool = False, **options: Any) -> nn.Module:
        net = create(name, pretrained=False, **options)
        if pretrained:
            assert options.get("num_classes") is None
            torch.manual_seed(77)
            for parameter in net.parameters():
                parameter.data.normal_(0, 0.05)
            state.update({key: value.clone() for key, value in net.state_dict().items()})
        return net

    monkeypatch.setattr(timm, "create_model", create_model)
    return lambda: state  # type: ignore[return-value]


def started(model: str, init_from: str, channels: int = 3) -> tuple[dict[str, Tensor], str]:
    """The state of a network of four classes with the weights at `init_from`, and their digest."""
    known = dataset_info("cifar10")
    assert known is not None
    info = replace(known, num_classes=4, class_names=tuple("abcd"), image_shape=(channels, 32, 32))
    network = build_model(model, num_classes=4, image_shape=info.image_shape)
    config = ModelConfig(model=model, init_from=init_from)
    digest = put_initial_weights(network, config, info, FrozenParts(network, ()))
    assert network.eval()(torch.rand(2, channels, 32, 32)).shape == (2, 4)
    return network.state_dict(), digest


@needs("timm")
@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_published_weights_of_timm(name: str, published: Callable[[], dict[str, Tensor]]) -> None:
    (kept, digest), given = started(f"timm:{name}", "timm"), published()
    heads = ("fc.", "head.")
    for key, value in given.items():
        if not key.startswith(heads):
            assert torch.equal(kept[f"net.{key}"], value), key
    import timm

    config = timm.get_pretrained_cfg(name)
    assert kept["normalize.mean"].flatten().tolist() == pytest.approx(config.mean)
    assert kept["normalize.std"].flatten().tolist() == pytest.approx(config.std)
    assert next(v for k, v in kept.items() if k.startswith(tuple(f"net.{h}" for h in heads))).shape[0] == 4
    assert started(f"timm:{name}", "timm")[1] == digest


def test_published_weights_of_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    torch.manual_seed(5)
    theirs = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: theirs)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *a, **k: theirs)
    kept, _ = started("torchvision:resnet18", "torchvision")
    assert torch.equal(kept["net.layer4.1.conv2.weight"], theirs["layer4.1.conv2.weight"])
    assert kept["net.fc.weight"].shape == (4, 512)
    assert kept["normalize.mean"].flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


@needs("timm", "huggingface_hub")
def test_a_repository_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """model.safetensors and the mean in its config.json, at the revision that was asked for."""
    import huggingface_hub
    import timm

    theirs = timm.create_model("resnet10t", num_classes=4)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    about = {"architecture": "resnet10t", "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    asked = []

    def download(repository: str, file: str, revision: str | None = None) -> str:
        asked.append((repository, file, revision))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    kept, digest = started("timm:resnet10t", "hf:me/robust@v2")
    assert asked[0] == ("me/robust", "model.safetensors", "v2")
    assert digest == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert torch.equal(kept["net.fc.weight"], theirs.fc.weight)
    assert kept["normalize.mean"].flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize("source_name", ["timm", "torchvision", "hf:me/robust"])
def test_no_network(source_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every failed download is one line with the remedy."""
    pytest.importorskip("timm")

    def fails(*arguments: object, **options: object) -> None:
        raise ConnectionError("no route to host")

    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "hf_hub_download", fails)
    monkeypatch.setattr("timm.create_model", fails)
    monkeypatch.setattr("torchvision.models.get_model", fails)
    model = {"torchvision": "torchvision:resnet18"}.get(source_name, "resnet18")
    model = "timm:resnet10t" if source_name == "timm" else model
    info = dataset_info("cifar10")
    assert info is not None
    with pytest.raises(UserError, match=r"needs a network; or .*no route to host") as caught:
        find_initial(ModelConfig(model=model, init_from=source_name), info)
    assert "\n" not in str(caught.value)


def trained_on_ranks(source: str, folder: str) -> str:
    run = Path(folder) / "run"
    flags = ["--method", "natural", "--run-dir", str(run), *TINY, "--epochs", "1", "--init-from", source]
    flags += ["--freeze", "features.[01].*", "--zero1"]
    assert main(["train", *flags]) == 0
    return str(run)


def test_two_processes_start_from_what_the_first_has_read(
    ranks: Callable[[int], RankPool], source: Path, tmp_path: Path
) -> None:
    one = Path(trained_on_ranks(str(source), str(tmp_path / "one")))
    two = Path(ranks(2)(trained_on_ranks, str(source), str(tmp_path / "two"))[0])
    left, right = weights(one), weights(two)
    given = load_file(source / "best" / "model.safetensors")
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=2e-4, atol=1e-5, msg=key)
    for key in (k for k in given if k.startswith(("net.features.0.", "net.features.1."))):
        assert torch.equal(right[key], given[key]), key
    assert to_flat(stored_config(two))["init_sha256"] == to_flat(stored_config(one))["init_sha256"]


def test_evaluation_reads_the_same_weights(source: Path, tmp_path: Path) -> None:
    """A network in a user's file takes the same foreign weights by eval --weights and by --init-from."""
    (tmp_path / "net.py").write_text(
        "from fastdynat.models import build_model\n"
        "def make(num_classes):\n"
        f"    return build_model('small', num_classes=num_classes, image_shape={DIGITS}).net\n"
    )
    network, _ = load_network(source)
    torch.save(network.net.state_dict(), tmp_path / "w.pt")
    found = load_foreign(
        f"{tmp_path}/net.py:make", num_classes=10, image_shape=DIGITS, weights=tmp_path / "w.pt"
    )
    run = train(
        tmp_path / "run", "--model", f"{tmp_path}/net.py:make", "--init-from", tmp_path / "w.pt", *STILL
    )
    kept = weights(run)
    assert torch.equal(kept["linear.weight"], found.model.state_dict()["linear.weight"])


def test_normalised_weights_for_a_network_that_takes_plain_images(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net.py").write_text(
        "from fastdynat.models import build_model\n"
        "def make(num_classes):\n"
        f"    return build_model('small', num_classes=num_classes, image_shape={DIGITS}).net\n"
    )
    shutil.copy(source / "best" / "model.safetensors", tmp_path / "w.safetensors")
    flags = ["--model", f"{tmp_path}/net.py:make", "--init-from", tmp_path / "w.safetensors"]
    assert "expects images normalised by mean" in refusal(capsys, tmp_path / "run", *flags)
