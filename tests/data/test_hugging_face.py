"""Data that Hugging Face `datasets` loads, such as parquet files: rows, labels, order and errors."""

import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import needs
from PIL import Image
from safetensors.torch import load_file
from support.tiny_run import TINY

from fastdynat.commands.main import main
from fastdynat.data import ImageSet, choose_loader, load_test, make_loader, open_train, sources
from fastdynat.data.hugging_face import TableImages
from fastdynat.errors import UserError
from fastdynat.machine import free_memory

pytestmark = needs("datasets")
CLASSES = ["ant", "bee", "cat", "dog"]
SIZE = 12


@pytest.fixture(autouse=True, scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No network, and a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True, raising=False)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True, raising=False)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def pixels(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def write(
    folder: Path,
    split: str,
    images: list[bytes],
    labels: list[Any],
    *,
    columns: tuple[str, str] = ("image", "label"),
    typed: bool = True,
) -> Path:
    """A parquet file of a split; `typed`: with the types Image and ClassLabel, as the hub has them."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageColumn

    rows: dict[str, Any] = {columns[0]: images, columns[1]: labels}
    if typed:
        rows[columns[0]] = [{"bytes": data, "path": None} for data in images]
        features = Features({columns[0]: ImageColumn(), columns[1]: ClassLabel(names=CLASSES)})
        data = Dataset.from_dict(rows, features=features)
    else:
        data = Dataset.from_dict(rows)
    folder.mkdir(parents=True, exist_ok=True)
    data.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 images: 160 for training, in mixed order, and 40 for tests, sorted by class."""
    root = tmp_path_factory.mktemp("parquet")
    write(root, "train", [*map(png, pixels(160, 0))], [(7 * n) % 4 for n in range(160)])
    return write(root, "test", [*map(png, pixels(40, 1))], sorted(n % 4 for n in range(40)))


def opened(folder: Path, **options: Any) -> Any:
    return open_train(f"hf:{folder}", None, **{"val_size": 16, "seed": 0, **options})


def test_images_labels_and_facts(folder: Path) -> None:
    split = opened(folder, val_size=0)
    info = split.info
    assert (info.name, info.num_classes, info.image_shape) == (f"hf:{folder.name}", 4, (3, SIZE, SIZE))
    assert (info.class_names, info.augment) == (tuple(CLASSES), "crop-flip")
    images = split.train_images()
    expected = torch.from_numpy(pixels(160, 0)).permute(0, 3, 1, 2)
    assert torch.equal(images.images, expected)
    assert images.labels.tolist() == [(7 * n) % 4 for n in range(160)]
    values = expected.double().transpose(0, 1).flatten(1) / 255
    assert info.mean == pytest.approx(values.mean(1).tolist())
    assert info.std == pytest.approx(values.std(1, correction=0).tolist())


def test_a_split_in_the_order_of_its_classes_takes_turns(folder: Path) -> None:
    info, test = load_test(f"hf:{folder}", None)
    assert test.labels.tolist() == [0, 1, 2, 3] * 10
    rows = [10 * label + turn for turn in range(10) for label in range(4)]
    expected = torch.from_numpy(pixels(40, 1)[rows]).permute(0, 3, 1, 2)
    assert torch.equal(test.read(torch.arange(40)), expected)
    assert info == opened(folder).info


def test_resized_as_an_image_folder_is(folder: Path, tmp_path: Path) -> None:
    for number, image in enumerate(pixels(160, 0)):
        for split in ("train", "test"):
            path = tmp_path / split / CLASSES[(7 * number) % 4] / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    ours = opened(folder, val_size=0, image_size=8).train_images()
    theirs = open_train("imagefolder", tmp_path, val_size=0, seed=0, image_size=8).train_images()
    assert sorted(map(bytes, ours.images.numpy())) == sorted(map(bytes, theirs.images.numpy()))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_torch_loader_gives_the_resident_batches(folder: Path, workers: int) -> None:
    split = opened(folder)
    options: dict[str, Any] = {"batch_size": 32, "augment": "crop-flip", "seed": 5, "device": "cpu"}
    streamed = make_loader("torch", split.train_files(), workers=workers, **options)
    resident = make_loader("resident", split.train_images(), workers=0, **options)
    for a, b in zip(streamed.epoch(1, 2), resident.epoch(1, 2), strict=True):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.labels, b.labels)


def test_validation_images_are_kept_or_streamed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = opened(folder)
    kept = split.val_images()
    monkeypatch.setattr(sources, "KEPT_BYTES", 0)
    streamed = split.val_images()
    assert isinstance(kept, ImageSet)
    assert isinstance(streamed, TableImages)
    assert torch.equal(kept.images, streamed.read(torch.arange(16)))
    assert kept.checksum() == streamed.checksum() != opened(folder, seed=1).val_images().checksum()


def test_images_in_files_of_their_own_are_checked_on_resume(tmp_path: Path) -> None:
    for split, seed in (("train", 2), ("test", 3)):  # a folder of images, whose rows hold their paths
        for number, image in enumerate(pixels(80, seed)):
            file = tmp_path / "own" / split / CLASSES[number // 20] / f"{number:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(image))
    files = sorted((tmp_path / "own" / "train").glob("*/*.png"), key=lambda path: path.name)
    found = opened(tmp_path / "own", val_size=0).train_files()

    def loader() -> Any:
        options: dict[str, Any] = {"batch_size": 8, "augment": "none", "seed": 0, "device": "cpu"}
        return make_loader("torch", found, workers=0, **options)

    state = loader().state_dict()
    loader().load_state_dict(state)
    before = {number: files[number].read_bytes() for number in (0, 1)}
    for number, changed in ((0, before[0][:-1] + b"\0"), (1, before[1] + b"\0")):
        files[number].write_bytes(changed)  # 0 is in the sample; 1 is not, but has another size
        with pytest.raises(UserError, match="other content; restore them"):
            loader().load_state_dict(state)
        files[number].write_bytes(before[number])
    loader().load_state_dict(state)
    files[1].unlink()
    with pytest.raises(UserError, match=r"row 1 of .*cannot read"):
        loader().state_dict()


def test_the_choice_of_the_loader(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = opened(folder)
    assert choose_loader(split, torch.device("cpu"))[0] == "resident"
    monkeypatch.setattr(free_memory, "available_memory", lambda: 1)
    assert choose_loader(split, torch.device("cpu"))[0] == "torch"


@pytest.mark.parametrize("typed", [True, False])
def test_other_columns_and_a_validation_split(tmp_path: Path, typed: bool) -> None:
    """Columns as CIFAR-100 has them, and without types, as pandas writes them."""
    images = [*map(png, pixels(12, 2))]
    columns = ("img", "fine_label")
    write(tmp_path, "train", images, [0, 1, 2, 3] * 3, columns=columns, typed=typed)
    write(tmp_path, "validation", images[:4], [0, 1, 2, 3], columns=columns, typed=typed)
    info, test = load_test(f"hf:{tmp_path}", None)
    assert (info.num_classes, len(test)) == (4, 4)
    assert info.class_names == (tuple(CLASSES) if typed else ("0", "1", "2", "3"))
    assert torch.equal(test.read(torch.arange(4)), opened(tmp_path, val_size=0).train_images().images[:4])


def test_a_test_split_without_published_labels_is_passed_over(tmp_path: Path) -> None:
    images = [*map(png, pixels(12, 2))]
    write(tmp_path, "train", images, [0, 1, 2, 3] * 3)
    write(tmp_path, "test", images[:3], [-1, -1, -1])
    with pytest.raises(UserError, match="has no labelled test images"):
        load_test(f"hf:{tmp_path}", None)
    write(tmp_path, "validation", images[:4], [0, 1, 2, 3])
    assert len(load_test(f"hf:{tmp_path}", None)[1]) == 4


def test_a_saved_dataset(tmp_path: Path, folder: Path) -> None:
    from datasets import load_dataset

    data = load_dataset(str(folder))
    data["train"] = data["train"].select(range(100, 20, -1))  # rows by an index, not in the table's order
    data.save_to_disk(str(tmp_path / "saved"))
    images = opened(tmp_path / "saved", val_size=0).train_images()
    expected = torch.from_numpy(pixels(160, 0)[100:20:-1].copy()).permute(0, 3, 1, 2)
    assert torch.equal(images.images, expected)


def training(images: list[bytes], labels: list[Any], **options: Any) -> Callable[[Path], object]:
    """A writer of a training split."""
    return lambda root: write(root, "train", images, labels, **options)


FEW, ODD_SIZE = [*map(png, pixels(7, 0))], png(pixels(1, 0)[0, :5])
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "a corrupt image": (
        training([*FEW, b"none"], [0, 1, 2, 3] * 2),
        "cannot decode image 'row 7 of hf:.*, split train' ",
    ),
    "another size": (
        training([*FEW, ODD_SIZE], [0, 1, 2, 3] * 2),
        "'row 7 of hf:.*, split train' is 5x12 but the first image is 12x12; pass --image-size",
    ),
    "no column of images": (
        training(FEW[:2], [0, 1], columns=("photo", "label"), typed=False),
        "has no column of images among photo, label; give one called image",
    ),
    "no column of classes": (
        training(FEW[:2], [0, 1], columns=("image", "y"), typed=False),
        "has no column of classes among image, y; call the one to learn label",
    ),
    "a label that is no class": (
        training(FEW[:4], [0, 1, -2, 1], typed=False),
        r"split train: label -2 at index 2 is outside \[0, 2\)",
    ),
    "a missing label": (
        training(FEW[:3], [0, None, 1], typed=False),
        "split train: row 1 has no label; remove it",
    ),
    "no training split": (
        lambda root: write(root, "test", FEW[:2], [0, 1]),
        "has no split 'train'; its splits are test",
    ),
    "an empty folder": (
        lambda root: root.mkdir(),
        "cannot load hf:.*NAME_OR_FOLDER is a folder of parquet files",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_one_line(case: str, tmp_path: Path) -> None:
    make, message = BAD[case]
    make(tmp_path / "data")
    with pytest.raises(UserError, match=message) as caught:
        opened(tmp_path / "data", val_size=0).train_images()
    assert "\n" not in str(caught.value)


def test_no_such_data_is_one_line() -> None:
    with pytest.raises(UserError, match="cannot load hf:no/such-data") as caught:
        opened(Path("no/such-data"))
    assert "\n" not in str(caught.value)


def test_a_missing_library_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'fastdynat\[datasets\]'"):
        opened(folder)


def test_train_pause_resume_and_evaluate(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder.parent)
    flags = ["train", "--data", f"hf:{folder.name}", "--val-size", "16", "--batch-size", "32", "--steps", "1"]
    flags += ["--model", "small", "--method", "madry", "--epochs", "2", "--quiet"]
    for name, loader in (("whole", "resident"), ("parts", "torch")):
        more = ["--workers", "1", "--stop-after", "1"] if loader == "torch" else []
        assert main([*flags, *more, "--loader", loader, "--run-dir", str(tmp_path / name)]) == 0
    monkeypatch.chdir(tmp_path)  # the folder is found from another directory
    assert main(["train", "--resume", "parts", "--loader", "resident"]) == 2
    assert "loader is torch in this run, not resident" in capsys.readouterr().err
    assert main(["train", "--resume", "parts", "--quiet"]) == 0
    whole, parts = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert main(["eval", "parts", "--attacks", "clean,pgd2", "--num-images", "8", "--quiet"]) == 0
    assert main([*flags[:1], "--data", "hf:", *flags[3:]]) == 2
    assert "unknown dataset 'hf:'" in capsys.readouterr().err
    assert not os.path.exists("runs")


def test_dali_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*TINY[2:], "--data", f"hf:{folder}", "--model", "small", "--loader", "dali"]
    assert main(["train", *flags, "--run-dir", str(tmp_path / "run")]) == 2
    assert "--loader dali: DALI" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
