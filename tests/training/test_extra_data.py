"""Runs with extra images: what a run keeps, exact resume, pseudo-labels, and refusals before any work."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.extra_images import SILENT, extra_arrays, write_npz
from support.tiny_run import TINY
from torch import nn

from fastdynat.commands.main import main
from fastdynat.config import DataConfig, ExtraConfig, RunConfig, TrainConfig, read_config_file
from fastdynat.data import DatasetInfo
from fastdynat.data.extra_store import ExtraSet, ExtraStore
from fastdynat.data.imagefolder import list_files
from fastdynat.data.pack_sources import open_sources
from fastdynat.data.store_writer import pack
from fastdynat.errors import UserError
from fastdynat.execution.float32 import float32_flags, put_float32_flags
from fastdynat.methods.madry import MadryOptions
from fastdynat.runs import load_network
from fastdynat.training.extra_data import open_extra
from fastdynat.training.pseudo_labels import _predictions, read_labels

FAST = [*TINY, "--method", "madry"]
EXTRA = 90


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    """Extra images in the form of digits, 1x32x32."""
    return write_npz(tmp_path / "extra.npz", EXTRA, 32, 1)


def train(*flags: object) -> int:
    return main(["train", *map(str, flags)])


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "last" / "model.safetensors")


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def error_of(capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    """The one line by which the training is refused."""
    capsys.readouterr()
    assert train(*flags) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    (line,) = lines
    return line


def test_a_run_says_and_keeps_its_extra_images(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    flags = [flag for flag in FAST if flag != "--quiet"]
    assert train(*flags, "--epochs", 1, "--extra-data", npz, "--run-dir", run) == 0
    store = ExtraStore(npz.with_name("extra.npz.packed"))
    said = capsys.readouterr().err
    assert (
        f"90 extra images, 22 in each batch of 32, drawn with replacement: {store.folder}, checksum "
        f"{store.facts.checksum}" in said
    )
    kept = read_config_file(run / "config.yaml")
    assert kept["extra_data"] == str(store.folder)
    assert kept["extra_checksum"] == store.facts.checksum
    assert kept["extra_labels"] is None
    state = torch.load(run / "last" / "state.pt", weights_only=True)
    assert state["loader"]["extra"] == {
        "images": EXTRA,
        "per_step": 22,
        "share": 0.7,
        "replacement": True,
        "checksum": store.facts.checksum,
    }
    assert state["loader"]["num_images"] == 200


@pytest.mark.parametrize("replacement", ["--extra-replacement", "--no-extra-replacement"])
def test_a_run_resumes_exactly_from_the_middle_of_an_epoch(
    replacement: str, npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*TINY, "--method", "dynat", "--epochs", 2, "--extra-data", npz, replacement]
    flags += ["--epoch-steps", 5, "--save-every", 1e-9]  # a checkpoint after each step
    assert train(*flags, "--run-dir", tmp_path / "whole") == 0

    from fastdynat.training.trainer import Trainer

    save, saved = Trainer._save, [0]

    def stopping(trainer: Trainer, **options: Any) -> None:
        save(trainer, **options)
        saved[0] += 1
        if saved[0] == 8:  # after 5 steps, an epoch, and two more steps
            trainer._writer.close()
            raise RuntimeError("power cut")

    monkeypatch.setattr(Trainer, "_save", stopping)
    with pytest.raises(RuntimeError, match="power cut"):
        train(*flags, "--run-dir", tmp_path / "cut")
    monkeypatch.undo()
    state = torch.load(tmp_path / "cut" / "last" / "state.pt", weights_only=True)
    assert 0 < state["epoch_step"] < 5
    npz.unlink()  # the store is enough
    assert main(["train", "--resume", str(tmp_path / "cut")]) == 0
    assert_equal(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def test_every_loader_trains_alike(npz: Path, tmp_path: Path) -> None:
    for loader in ("resident", "torch"):
        flags = [*FAST, "--epochs", 1, "--extra-data", npz, "--loader", loader]
        workers = ["--workers", 1] if loader == "torch" else []
        assert train(*flags, *workers, "--run-dir", tmp_path / loader) == 0
    assert_equal(weights(tmp_path / "resident"), weights(tmp_path / "torch"))


def test_a_share_of_nothing_trains_as_without_extra_images(npz: Path, tmp_path: Path) -> None:
    for name, flags in {"with": ["--extra-data", npz, "--extra-share", 0], "without": []}.items():
        assert train(*FAST, "--epochs", 1, *flags, "--run-dir", tmp_path / name) == 0
    assert_equal(weights(tmp_path / "with"), weights(tmp_path / "without"))


def test_a_resumed_run_refuses_other_extra_images(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = tmp_path / "run", write_npz(tmp_path / "other.npz", EXTRA + 1, 32, 1)
    assert train(*FAST, "--epochs", 2, "--stop-after", 1, "--extra-data", npz, "--run-dir", run) == 0
    assert "so it holds other images" in error_of(capsys, "--resume", run, "--extra-data", other)
    assert "extra_share is 0.7" in error_of(capsys, "--resume", run, "--extra-share", 0.5)
    moved = tmp_path / "moved"
    npz.with_name("extra.npz.packed").rename(moved)
    npz.unlink()
    assert "no such file" in error_of(capsys, "--resume", run)
    assert train("--resume", run, "--extra-data", moved) == 0


def test_pseudo_labels_are_the_networks_clean_predictions(
    tmp_path: Path, messages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    images, _ = extra_arrays(EXTRA, 32, 1)
    np.savez(tmp_path / "extra.npz", image=images)
    given = [*FAST, "--epochs", 1, "--extra-data", tmp_path / "extra.npz"]
    refusal = error_of(capsys, *given, "--run-dir", tmp_path / "x")
    assert "have no labels, which method madry needs; label them with a network: --extra-labels" in refusal
    assert [entry.name for entry in tmp_path.iterdir()] == ["extra.npz"]  # refused before it is packed

    teacher = tmp_path / "teacher"
    assert train(*FAST, "--epochs", 1, "--run-dir", teacher) == 0
    network, _ = load_network(teacher)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        expected = network(x).argmax(1)
    for name in ("a", "b"):
        assert train(*given, "--extra-labels", teacher, "--run-dir", tmp_path / name) == 0
    assert sum("labelling 90 extra images" in text for text in messages) == 1
    kept = read_config_file(tmp_path / "a" / "config.yaml")
    assert np.load(kept["extra_labels"]).tolist() == expected.tolist()
    assert kept["extra_checksum"] != ExtraStore(Path(kept["extra_data"])).facts.checksum
    assert_equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    # The same labels given as a file, and the same run without the network.
    np.save(tmp_path / "labels.npy", expected.numpy())
    assert train(*given, "--extra-labels", tmp_path / "labels.npy", "--run-dir", tmp_path / "c") == 0
    assert_equal(weights(tmp_path / "a"), weights(tmp_path / "c"))
    teacher.rename(tmp_path / "gone")
    assert train("--resume", tmp_path / "a") == 0


class Recorder(nn.Module):
    """Predicts class 0 and keeps in which precision a network would have computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, str, bool]] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        convolutions, products = torch.backends.cudnn.conv, torch.backends.cuda.matmul
        autocast = torch.is_autocast_enabled("cpu")
        self.seen.add((convolutions.fp32_precision, products.fp32_precision, autocast))
        return torch.eye(10)[torch.zeros(len(x), dtype=torch.int64)]


def test_pseudo_labels_are_computed_in_float32(npz: Path, tmp_path: Path) -> None:
    store = pack(open_sources([npz], None), tmp_path / "store", display=SILENT)
    network, flags = Recorder(), float32_flags()
    try:
        torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "tf32"
        with torch.autocast("cpu"):
            labels = _predictions(network, store, (1, 32, 32), torch.device("cpu"), SILENT)
    finally:
        put_float32_flags(flags)
    assert labels.tolist() == [0] * EXTRA
    assert network.seen == {("ieee", "ieee", False)}


def test_a_network_of_other_classes_labels_nothing_even_where_its_labels_are_stored(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, given = tmp_path / "teacher", [*FAST, "--epochs", 1, "--extra-data", npz]
    assert train(*FAST, "--epochs", 1, "--run-dir", teacher) == 0
    weights_file, letters = teacher / "last" / "model.safetensors", tmp_path / "letters.safetensors"
    assert train(*given, "--extra-labels", weights_file, "--run-dir", tmp_path / "a") == 0
    # The same weights, said to be those of ten other classes.
    letters.write_bytes(weights_file.read_bytes())
    about = json.loads(weights_file.with_suffix(".json").read_text())
    about |= {"class_names": [*"abcdefghij"], "dataset": "letters"}
    letters.with_suffix(".json").write_text(json.dumps(about))
    said = error_of(capsys, *given, "--extra-labels", letters, "--run-dir", tmp_path / "b")
    assert f"--extra-labels {letters} was trained on letters, whose class 0 is 'a'" in said


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(EXTRA - 1, dtype=np.int64), "must be whole numbers (90,), one per image, got int64 (89,)"),
        (np.zeros(EXTRA), "got float64 (90,)"),
        (np.full(EXTRA, 10), "label 10 at index 0 is outside [0, 10)"),
        (None, "cannot be read as labels"),
    ],
)
def test_bad_label_files_are_refused(
    labels: np.ndarray | None, message: str, npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "labels.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00\x05\x00{'a'") if labels is None else np.save(path, labels)
    assert message in error_of(capsys, *FAST, "--extra-data", npz, "--extra-labels", path)


def test_unlabelled_extra_images_are_for_semi_supervised_methods(tmp_path: Path) -> None:
    images, _ = extra_arrays(EXTRA, 32, 1)
    np.savez(tmp_path / "extra.npz", image=images)
    flags = [*TINY, "--method", "vat", "--labelled", 50, "--epochs", 1]
    assert train(*flags, "--extra-data", tmp_path / "extra.npz", "--run-dir", tmp_path / "run") == 0


def test_a_burn_in_refuses_unlabelled_extra_images_before_they_are_packed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "extra.npz", image=extra_arrays(EXTRA, 32, 1)[0])
    flags = [*TINY, "--method", "vat", "--epochs", 2, "--burn-in", 1, "--extra-data", tmp_path / "extra.npz"]
    said = error_of(capsys, *flags, "--run-dir", tmp_path / "run")
    assert "burn-in 1: natural training needs every label, but the extra images in" in said
    assert "have none; leave --burn-in out, or label them with a network: --extra-labels RUN" in said
    assert [entry.name for entry in tmp_path.iterdir()] == ["extra.npz"]


@pytest.mark.parametrize("method", ["lbgat", "free"])
def test_methods_with_guides_and_buffers_of_the_batch_train(method: str, npz: Path, tmp_path: Path) -> None:
    steps = [] if method == "free" else ["--steps", 1]
    flags = [*TINY[: TINY.index("--steps")], "--method", method, *steps, "--epochs", 1, "--epoch-steps", 2]
    flags += ["--quiet"]
    assert train(*flags, "--extra-data", npz, "--run-dir", tmp_path / "run") == 0


def test_class_folders_are_matched_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels, _ = extra_arrays(12, 32)
    for number in range(12):
        for place, name in (("data/train", "cat dog"), ("data/test", "cat dog"), ("extra", "dog cat")):
            label = name.split()[number % 2]
            folder = tmp_path / place / label
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[number]).save(folder / f"{number}.png")
    flags = ["--data", "imagefolder", "--data-dir", tmp_path / "data", "--model", "small", "--method"]
    flags += ["madry", "--steps", 1, "--val-size", 2, "--batch-size", 4, "--epochs", 1, "--quiet"]
    flags += ["--extra-data", tmp_path / "extra", "--extra-share", 0.5]
    assert train(*flags, "--run-dir", tmp_path / "run") == 0
    (tmp_path / "extra" / "dog").rename(tmp_path / "extra" / "wolf")
    said = error_of(capsys, *flags, "--run-dir", tmp_path / "other")
    assert "'wolf' is no class of imagefolder; name the class folders like its classes (cat, dog" in said


def numbers(*names: object) -> list[str]:
    return [str(name) for name in names]


def class_info(root: Path, names: list[str]) -> DatasetInfo:
    """Facts about a dataset of class folders called `names`, which it numbers as it reads them."""
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / name / "0.png")
    classes = list_files(root).class_names
    return DatasetInfo("folders", len(classes), (3, 8, 8), classes, (0.5,) * 3, (0.2,) * 3, "none")


def extra_in_folders(root: Path, names: list[str], info: DatasetInfo) -> ExtraSet:
    """Extra images of class folders called `names`: two in each, of the colour that the name spells."""
    for name in names:
        (root / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (8, 8), (int(name),) * 3).save(root / name / f"{number}.png")
    return opened(root, info)


def opened(
    source: Path, info: DatasetInfo, labels: Path | None = None, data: str = "imagefolder"
) -> ExtraSet:
    extra = ExtraConfig(extra_data=str(source), extra_labels=None if labels is None else str(labels))
    about, run = DataConfig(data=data), RunConfig(quiet=True)
    config = TrainConfig(method="madry", options=MadryOptions(), data=about, extra=extra, run=run)
    found = open_extra(config, info)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("classes", "extra"),
    [(range(11), range(11)), (range(1, 6), range(1, 5)), (range(10), range(10)), (range(11), (2, 10))],
)
def test_numbered_class_folders_mean_the_classes_of_their_names(
    classes: Sequence[int], extra: Sequence[int], tmp_path: Path
) -> None:
    """A dataset numbers its folders alphabetically: 0, 1, 10, 2."""
    info = class_info(tmp_path / "data", numbers(*classes))
    found = extra_in_folders(tmp_path / "extra", numbers(*extra), info)
    everything = torch.arange(len(found))
    colours = found.read(everything)[:, 0, 0, 0].tolist()
    assert sorted(colours) == sorted([*extra] * 2)
    assert [info.class_names[label] for label in found.labels_at(everything)] == numbers(*colours)


def test_numbered_class_folders_are_labels_of_classes_with_words_for_names(tmp_path: Path) -> None:
    words = [f"class-{letter}" for letter in "abcdefghijkl"]
    found = extra_in_folders(tmp_path / "extra", numbers(*range(12)), class_info(tmp_path / "data", words))
    everything = torch.arange(len(found))
    assert found.labels_at(everything).tolist() == found.read(everything)[:, 0, 0, 0].tolist()
    with pytest.raises(UserError, match=r"label 11 at index 3 is outside \[0, 11\)"):
        opened(tmp_path / "extra", class_info(tmp_path / "fewer", words[:11]))


def test_numbers_that_may_mean_two_classes_are_refused(tmp_path: Path) -> None:
    info = class_info(tmp_path / "data", numbers(*range(1, 6)))
    with pytest.raises(
        UserError, match="'0' is no class of folders; name the class folders like its classes"
    ):
        extra_in_folders(tmp_path / "extra", numbers(*range(5)), info)
    unnamed = r"labels without class names, but the class '1' of folders has label 0"
    with pytest.raises(UserError, match=unnamed):
        opened(write_npz(tmp_path / "extra.npz", EXTRA), info)
    # A store as earlier versions wrote it from numbered folders: refused, and packed again from its source.
    store = extra_in_folders(tmp_path / "known", numbers(*range(1, 6)), info).store.folder
    facts = json.loads((store / "store.json").read_text())
    (store / "store.json").write_text(json.dumps(facts | {"class_names": None}))
    with pytest.raises(UserError, match=unnamed):
        opened(store, info)
    assert opened(tmp_path / "known", info).store.facts.class_names == info.class_names


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--extra-share", "1"], "extra-share must be a share of the batch in [0, 1), got 1"),
        (["--extra-share", "-0.1"], "extra-share must be a share of the batch in [0, 1)"),
        (["--extra-share", "nan"], "extra-share must be a share of the batch in [0, 1)"),
        (["--extra-share", "0.01"], "of a batch of 32 is less than one image"),
        (["--drop-last"], "with --extra-data every batch is full"),
        (["--extra-checksum", "0123456789abcdef"], "so it holds other images or labels"),
        (["--extra-checksum", "abc"], "must be 16 hexadecimal digits"),
        (["--batch-size", "400", "--extra-share", "0.1"], "takes 360 of the 200 training images"),
        (
            ["--batch-size", "160", "--extra-share", "0.7", "--no-extra-replacement"],
            "takes 112 extra images for a batch of 160, but there are 90",
        ),
    ],
)
def test_values_that_cannot_be_are_refused_in_one_line(
    flags: list[str], message: str, npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error_of(capsys, *FAST, "--extra-data", npz, *flags, "--run-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--extra-share=0.5", "--extra-labels=RUN", "--no-extra-replacement"])
def test_flags_without_extra_data_are_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "needs --extra-data" in error_of(capsys, *FAST, flag)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"side": 16}, "are 1x16x16 (channels, height, width), but those of digits are 1x32x32"),
        ({"channels": 3, "side": 32}, "are 3x32x32"),
    ],
)
def test_other_shapes_are_refused_before_they_are_packed(
    arrays: dict[str, int], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_npz(tmp_path / "a.npz", 20, **{"channels": 1, **arrays})
    assert message in error_of(capsys, *FAST, "--extra-data", path, "--run-dir", tmp_path / "run")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.npz"]


def test_other_sizes_are_resized_where_asked(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", 60, 24, 1)
    flags = [*FAST, "--epochs", 1, "--image-size", 16, "--extra-data", path]
    assert train(*flags, "--run-dir", tmp_path / "run") == 0


def test_labels_that_the_dataset_lacks_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = extra_arrays(20, 32, 1)
    labels[7] = 10
    np.savez(tmp_path / "a.npz", image=images, label=labels)
    said = error_of(capsys, *FAST, "--extra-data", tmp_path / "a.npz", "--run-dir", tmp_path / "run")
    assert "label 10 at index 7 is outside [0, 10), the classes of digits" in said


def test_an_export_says_that_extra_images_were_used(npz: Path, tmp_path: Path) -> None:
    for name, flags in {"Extra2026Test": ["--extra-data", npz], "Plain2026Test": []}.items():
        assert train(*FAST, "--epochs", 1, *flags, "--run-dir", tmp_path / name) == 0
        out = tmp_path / f"{name}.pt"
        assert main(["export", str(tmp_path / name), "--out", str(out), "--dataset", "cifar10"]) == 0
        entry = json.loads(out.with_suffix(".json").read_text())
        assert entry["additional_data"] is (name == "Extra2026Test")


def labelled_folders(root: Path, counts: dict[str, int]) -> tuple[ExtraStore, list[int]]:
    """Class folders of different sizes, packed, and the colour of each of the store's images: its class."""
    for colour, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8), (colour,) * 3).save(root / name / f"{number:03}.png")
    store = pack(open_sources([root], None), root.with_name("store"), display=SILENT)
    return store, store.read(torch.arange(len(store)))[:, 0, 0, 0].tolist()


# Other names than the dataset's, and a teacher that is wrong about every fourth image.
FOLDERS = {"n01": 50, "n02": 70, "n03": 30}
WORDS = DatasetInfo("words", 3, (3, 8, 8), ("cat", "dog", "fox"), (0.5,) * 3, (0.2,) * 3, "none")


@pytest.mark.parametrize("wrong", [0, 4])
@pytest.mark.parametrize("dtype", ["int8", "int64", "uint8", "uint64", ">u8"])
def test_label_files_in_the_order_of_image_folder_are_refused(wrong: int, dtype: str, tmp_path: Path) -> None:
    store, classes = labelled_folders(tmp_path / "extra", FOLDERS)
    odd = [0] * len(classes)
    if wrong:
        odd[::wrong] = [1] * len(odd[::wrong])
    file = tmp_path / "labels.npy"
    meant = [2, 0, 1]  # the dataset's label of each folder
    found = [(meant[c] + o) % 3 for c, o in zip(classes, odd, strict=True)]
    np.save(file, np.array(found, dtype))
    assert read_labels(file, store, WORDS).tolist() == found
    wrongly = [(meant[c] + o) % 3 for c, o in zip(sorted(classes), odd, strict=True)]
    np.save(file, np.array(wrongly, dtype))
    with pytest.raises(UserError, match="has the order of torchvision's ImageFolder, one class folder after"):
        read_labels(file, store, WORDS)


def test_labels_that_class_folders_say_nothing_about_are_taken(tmp_path: Path) -> None:
    store, _ = labelled_folders(tmp_path / "extra", FOLDERS)
    for seed in range(20):
        file, labels = tmp_path / "labels.npy", np.random.default_rng(seed).integers(0, 3, len(store))
        np.save(file, labels)
        assert read_labels(file, store, WORDS).tolist() == labels.tolist()


def test_a_label_file_may_be_written_again_while_a_run_uses_its_labels(npz: Path, tmp_path: Path) -> None:
    store, file = pack(open_sources([npz], None), tmp_path / "store", display=SILENT), tmp_path / "labels.npy"
    info = DatasetInfo("ten", 10, (1, 32, 32), tuple("abcdefghij"), (0.5,), (0.2,), "none")
    labels = np.arange(EXTRA) % 10
    np.save(file, labels)
    found = ExtraSet(store, read_labels(file, store, info), info.image_shape, file)
    with file.open("r+b") as opened_file:  # as np.save does: in the same file
        np.save(opened_file, 9 - labels)
    assert found.labels_at(torch.arange(EXTRA)).tolist() == labels.tolist()


def test_the_meaning_of_labels_without_names_is_said(tmp_path: Path, messages: list[str]) -> None:
    """A folder numbers CIFAR-10's classes alphabetically: 0 is the bird, but in published files the plane."""
    words = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    info = class_info(tmp_path / "data", words)
    npz = write_npz(tmp_path / "extra.npz", EXTRA)
    opened(npz, info)
    first = "extra labels are read as 0 = bird, 1 = car, 2 = cat, 3 = deer, 4 = dog, 5 = frog, "
    assert [m for m in messages if m.startswith("extra labels")] == [
        first + "6 = horse, 7 = plane, 8 = ship, 9 = truck"
    ]
    messages.clear()
    np.save(tmp_path / "labels.npy", np.zeros(EXTRA, dtype=np.int64))
    opened(npz, class_info(tmp_path / "more", [*words, "zebra"]), tmp_path / "labels.npy")
    assert messages[-1].endswith("8 = ship, 9 = truck, ...")
    messages.clear()
    opened(npz, info, data="cifar10")  # its numbers are published
    opened(npz, class_info(tmp_path / "numbers", numbers(*range(10))))
    extra_in_folders(tmp_path / "named", numbers(*range(3)), info)
    assert not [m for m in messages if m.startswith("extra labels")]
