"""Named data sets: static facts, torchvision sets (constructors replaced, no network), digits, errors."""

import pickle
import struct
import urllib.error
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from support.splits import load_train

from fastdynat.data import dataset_info, known_datasets, load_test, torchvision_sets
from fastdynat.data.image_sets import channel_stats, resize_square
from fastdynat.errors import UserError

TORCHVISION = ["cifar10", "cifar100", "svhn", "mnist"]


def fake_constructor(name: str, calls: list[dict], *, bad_label: int | None = None):
    """Return what torchvision's class returns: 2 training images of each class, 1 test image of each."""

    def make(root: str, *, download: bool, **which: object) -> SimpleNamespace:
        calls.append({"root": root, "download": download, **which})
        info = torchvision_sets.INFOS[name]
        is_train = which.get("train", which.get("split") == "train")
        labels = np.tile(np.arange(info.num_classes), 2 if is_train else 1)
        if bad_label is not None:
            labels[3] = bad_label
        channels, height, width = info.image_shape
        chw = np.random.default_rng(0).integers(
            0, 256, (len(labels), channels, height, width), dtype=np.uint8
        )
        if name == "svhn":
            return SimpleNamespace(data=chw, labels=labels)
        if name == "mnist":
            return SimpleNamespace(data=torch.from_numpy(chw[:, 0]), targets=torch.from_numpy(labels))
        return SimpleNamespace(data=chw.transpose(0, 2, 3, 1), targets=labels.tolist())

    return make


def replace_torchvision(monkeypatch, name: str, make) -> None:
    monkeypatch.setattr(torchvision_sets.tv, torchvision_sets.CLASSES[name], make)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_sets(name, monkeypatch, tmp_path):
    calls: list[dict] = []
    replace_torchvision(monkeypatch, name, fake_constructor(name, calls))
    splits = load_train(name, tmp_path, val_size=5, seed=0)
    info, test = load_test(name, tmp_path, download=False)
    assert splits.info == info == dataset_info(name)
    assert splits.train.images.shape == (2 * info.num_classes - 5, *info.image_shape)
    assert splits.val.images.shape == (5, *info.image_shape)
    assert test.labels.tolist() == list(range(info.num_classes))
    assert splits.train.images.is_contiguous()
    assert calls[0]["root"] == str(tmp_path)
    assert [call["download"] for call in calls] == [True, False]
    trained_on = [call.get("split", call.get("train")) for call in calls]
    assert trained_on == (["train", "test"] if name == "svhn" else [True, False])


def write_cifar10(folder: Path, pixels: np.ndarray, labels: list[int]) -> None:
    folder = folder / "cifar-10-batches-py"
    folder.mkdir()
    rows = pixels.reshape(len(pixels), -1)
    for part in range(5):
        with (folder / f"data_batch_{part + 1}").open("wb") as file:
            pickle.dump({"data": rows[part::5], "labels": labels[part::5]}, file)
    with (folder / "batches.meta").open("wb") as file:
        pickle.dump({"label_names": list(torchvision_sets.INFOS["cifar10"].class_names)}, file)


def write_svhn(folder: Path, pixels: np.ndarray, labels: list[int]) -> None:
    # The files store the digit 0 as class 10 and the images as (H, W, C, N).
    stored = np.array([[label or 10] for label in labels])
    scipy.io.savemat(folder / "train_32x32.mat", {"X": pixels.transpose(2, 3, 1, 0), "y": stored})


def write_mnist(folder: Path, pixels: np.ndarray, labels: list[int]) -> None:
    folder = folder / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for split in ("train", "t10k"):
        header = struct.pack(">iiii", 0x803, len(pixels), 28, 28)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(
            struct.pack(">ii", 0x801, len(labels)) + bytes(labels)
        )


@pytest.mark.parametrize(
    ("name", "write"), [("cifar10", write_cifar10), ("svhn", write_svhn), ("mnist", write_mnist)]
)
def test_torchvision_reads_small_files_in_the_real_formats(name, write, monkeypatch, tmp_path):
    for module in (torchvision.datasets.cifar, torchvision.datasets.svhn):
        monkeypatch.setattr(module, "check_integrity", lambda *args: True)
    pixels = np.random.default_rng(0).integers(
        0, 256, (20, *torchvision_sets.INFOS[name].image_shape), dtype=np.uint8
    )
    labels = [index % 10 for index in range(20)]
    write(tmp_path, pixels, labels)
    train = load_train(name, tmp_path, val_size=0, seed=0, download=False).train
    got = {
        (image.numpy().tobytes(), int(label)) for image, label in zip(train.images, train.labels, strict=True)
    }
    assert got == {(image.tobytes(), label) for image, label in zip(pixels, labels, strict=True)}


def test_held_out_images_come_from_the_training_split(monkeypatch, tmp_path):
    replace_torchvision(monkeypatch, "cifar10", fake_constructor("cifar10", []))
    splits = load_train("cifar10", tmp_path, val_size=0.5, seed=0)
    seen = {image.numpy().tobytes() for image in torch.cat([splits.train.images, splits.val.images])}
    assert len(seen) == 20
    assert torch.bincount(splits.val.labels).tolist() == [1] * 10


def test_image_size_resizes_torchvision_sets(monkeypatch, tmp_path):
    replace_torchvision(monkeypatch, "mnist", fake_constructor("mnist", []))
    splits = load_train("mnist", tmp_path, val_size=0, seed=0, image_size=32)
    assert splits.info.image_shape == (1, 32, 32)
    assert splits.train.images.shape == (20, 1, 32, 32)


@pytest.mark.parametrize("bad", [10, -1])
def test_bad_label_is_named(bad, monkeypatch, tmp_path):
    replace_torchvision(monkeypatch, "svhn", fake_constructor("svhn", [], bad_label=bad))
    with pytest.raises(UserError, match=rf"svhn: label {bad} at index 3 is outside \[0, 10\)"):
        load_train("svhn", tmp_path, val_size=0, seed=0)


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError("no route to host"),
        RuntimeError("File not found or corrupted."),
        pickle.UnpicklingError("x"),
    ],
)
def test_failing_download_is_one_line_with_the_remedy(error, monkeypatch, tmp_path):
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    replace_torchvision(monkeypatch, "cifar10", fail)
    remedy = (
        r"--data-dir DIR must point at the folder that holds cifar-10-batches-py; .*--data imagefolder "
        r"--data-dir DIR"
    )
    with pytest.raises(
        UserError, match=rf"cannot load cifar10 from '.*' \({type(error).__name__}: .*\); {remedy}"
    ) as caught:
        load_train("cifar10", tmp_path, val_size=0, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", TORCHVISION)
def test_missing_data_without_download(name, tmp_path):
    with pytest.raises(UserError, match=f"cannot load {name} from .*{torchvision_sets.HELD_AS[name]}"):
        load_test(name, tmp_path, download=False)


def test_corrupt_cifar_files(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"not a pickle")
    with pytest.raises(UserError, match="corrupted"):
        load_train("cifar10", tmp_path, val_size=0, seed=0, download=False)


def test_no_data_dir():
    with pytest.raises(
        UserError, match="data set 'mnist' needs --data-dir DIR, the folder that holds MNIST/raw"
    ):
        load_test("mnist", None)


def test_digits():
    info, test = load_test("digits", None)
    splits = load_train("digits", None, val_size=100, seed=0)
    assert (len(splits.train), len(splits.val), len(test)) == (1338, 100, 359)
    assert splits.train.images.shape[1:] == info.image_shape == (1, 32, 32)
    assert (splits.train.images.min(), splits.train.images.max()) == (0, 255)
    # Identity of the images: the test set is fixed and no image of it is trained on.
    train = {image.numpy().tobytes() for image in torch.cat([splits.train.images, splits.val.images])}
    assert not train & {image.numpy().tobytes() for image in test.images}
    assert torch.bincount(test.labels).tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]


def test_digits_constants_are_those_of_the_training_images():
    splits = load_train("digits", None, val_size=0, seed=0)
    mean, std = channel_stats([splits.train.images])
    assert splits.info.mean == pytest.approx(mean, abs=1e-4)
    assert splits.info.std == pytest.approx(std, abs=1e-4)


def test_digits_limit_and_size():
    splits = load_train("digits", None, val_size=0, seed=0, limit=50, image_size=16)
    assert splits.info.image_shape == (1, 16, 16)
    assert splits.train.images.shape == (50, 1, 16, 16)
    assert splits.val.images.shape == (0, 1, 16, 16)
    assert torch.bincount(splits.train.labels).tolist() == [5] * 10


def test_known_datasets():
    assert set(known_datasets()) == {"cifar10", "cifar100", "svhn", "mnist", "digits", "imagefolder"}
    for name in known_datasets():
        info = dataset_info(name)
        assert (info is None) == (name == "imagefolder")
        if info is not None:
            assert info.name == name
            assert len(info.class_names) == len(set(info.class_names)) == info.num_classes
            assert len(info.mean) == len(info.std) == info.image_shape[0]


@pytest.mark.parametrize("call", [dataset_info, lambda name: load_test(name, None)])
def test_unknown_dataset(call):
    with pytest.raises(UserError, match="unknown dataset 'cifar-10': did you mean 'cifar10'"):
        call("cifar-10")


def test_bad_image_size():
    with pytest.raises(UserError, match="image size must be at least 1 pixel, got 0"):
        load_test("digits", None, image_size=0)


@pytest.mark.parametrize(("shape", "size"), [((8, 8), 16), ((6, 12), 6), ((13, 7), 20)])
def test_resize_keeps_constant_images(shape, size):
    images = torch.full((3, 2, *shape), 77, dtype=torch.uint8)
    assert torch.equal(resize_square(images, size), torch.full((3, 2, size, size), 77, dtype=torch.uint8))


def test_stats_of_constant_images_stay_usable():
    mean, std = channel_stats([torch.full((2, 3, 4, 4), 51, dtype=torch.uint8)])
    assert mean == pytest.approx((0.2, 0.2, 0.2))
    assert std == pytest.approx((1 / 255,) * 3)
