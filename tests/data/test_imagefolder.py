"""Image folders: the files read, their order, and one clear line for each kind of bad folder."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.splits import load_train

from fastdynat.data import imagefolder, load_test
from fastdynat.errors import UserError
from fastdynat.machine import free_memory as room

JPEG_ROOT = os.environ.get("FASTDYNAT_CIFAR10_JPEG")


def write_image(path: Path, size=(8, 8), *, mode: str = "RGB", seed: int = 0) -> np.ndarray:
    """Write noise as PNG (exact) or JPEG; returns the pixels as uint8 (H, W, 3)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)
    return pixels


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes, 5 and 3 training images, 2 test images each, PNG."""
    for label, (name, count) in enumerate([("ant", 5), ("bee", 3)]):
        for index in range(count):
            write_image(tmp_path / "train" / name / f"{index}.png", seed=10 * label + index)
        for index in range(2):
            write_image(tmp_path / "test" / name / f"{index}.png", seed=100 + 10 * label + index)
    return tmp_path


def load(root: Path, **kwargs):
    return load_train("imagefolder", root, **{"val_size": 0, "seed": 0, **kwargs})


def test_pixels_labels_and_facts(root):
    (root / "train" / ".cache").mkdir()
    (root / "train" / "ant" / "notes.txt").write_text("not an image")
    splits = load(root)
    assert splits.info.class_names == ("ant", "bee")
    assert splits.info.image_shape == (3, 8, 8)
    assert splits.train.labels.tolist() == [0, 1, 0, 1, 0, 1, 0, 0]  # the classes take turns
    first = np.asarray(Image.open(root / "train" / "ant" / "0.png")).transpose(2, 0, 1)
    assert torch.equal(splits.train.images[0], torch.from_numpy(first.copy()))
    values = splits.train.images.double() / 255
    assert splits.info.mean == pytest.approx(values.mean(dim=(0, 2, 3)).tolist())
    assert splits.info.std == pytest.approx(values.std(dim=(0, 2, 3), unbiased=False).tolist())


def test_facts_do_not_depend_on_what_is_held_out(root):
    info, test = load_test("imagefolder", root)
    splits = load(root, val_size=4, limit=3, seed=1)
    assert splits.info == info
    assert (len(splits.train), len(splits.val), len(test)) == (3, 4, 4)
    assert test.labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("name", ["val", "valid"])
def test_other_names_of_the_test_folder(root, name):
    (root / "test").rename(root / name)
    assert len(load_test("imagefolder", root)[1]) == 4


NOT_USED = "{!r}{} is not used: the test images are those in {!r}"


def test_a_val_folder_beside_the_test_folder_is_said_to_be_unused(root, messages):
    shutil.copytree(root / "test", root / "val")
    for index in range(3):
        write_image(root / "val" / "ant" / f"more{index}.png")
    assert len(load_test("imagefolder", root)[1]) == 4
    assert NOT_USED.format(str(root / "val"), "", "test") in messages
    messages.clear()
    load(root)
    assert NOT_USED.format(str(root / "val"), "", "test") in messages


@pytest.mark.parametrize("inside", ["", "images"])  # ILSVRC, and Tiny ImageNet's test folder
def test_an_unlabelled_test_folder_gives_way_to_val(root, inside, messages):
    (root / "test").rename(root / "val")
    for index in range(3):
        write_image(root / "test" / inside / f"{index}.png")
    labels = load_test("imagefolder", root)[1].labels
    assert labels.tolist() == [0, 1, 0, 1]
    assert NOT_USED.format(str(root / "test"), ", which has no class folders,", "val") in messages
    assert len(load(root).train) == 8
    shutil.rmtree(root / "val")
    with pytest.raises(UserError, match=r"test' holds \d class folder\(s\); classification needs at least 2"):
        load_test("imagefolder", root)


def listed_under(monkeypatch, *locked: Path) -> list[Path]:
    """Folders that are listed from now on, by whatever means of Python; those in `locked` cannot be."""
    listed, scandir, listdir = [], os.scandir, os.listdir

    def counting(function):
        def listing(folder="."):
            listed.append(Path(str(folder)))
            if listed[-1] in locked:
                raise PermissionError(13, "Permission denied", str(folder))
            return function(folder)

        return listing

    monkeypatch.setattr(os, "scandir", counting(scandir))
    monkeypatch.setattr(os, "listdir", counting(listdir))
    return listed


def test_folders_behind_the_test_folder_are_not_read(root, monkeypatch, messages):
    shutil.copytree(root / "test", root / "val")
    listed = listed_under(monkeypatch, root / "val")
    assert len(load_test("imagefolder", root)[1]) == 4
    assert root / "test" in listed  # so that listing is seen
    assert root / "val" not in listed
    assert NOT_USED.format(str(root / "val"), "", "test") in messages


def test_an_unlabelled_test_folder_is_listed_once_and_its_files_are_left_alone(root, monkeypatch):
    (root / "test").rename(root / "val")
    (root / "test").mkdir()
    for index in range(50):
        (root / "test" / f"{index}.png").write_bytes(b"")
    listed, asked, stat = listed_under(monkeypatch), [], os.stat
    monkeypatch.setattr(os, "stat", lambda path, **how: asked.append(Path(str(path))) or stat(path, **how))
    assert len(load_test("imagefolder", root)[1]) == 4
    assert listed.count(root / "test") == 1
    assert any(path.is_relative_to(root / "val") for path in asked)  # so that asking is seen
    assert not [path for path in asked if path.parent == root / "test"]


def test_a_test_folder_that_cannot_be_read_does_not_give_way(root, monkeypatch):
    """It may hold the test images that are meant."""
    shutil.copytree(root / "test", root / "val")
    listed_under(monkeypatch, root / "test")
    with pytest.raises(UserError, match=r"cannot read the folder '.*test' \(Permission denied\)"):
        load_test("imagefolder", root)


def test_links_to_class_folders_count_and_links_in_a_circle_do_not(root):
    (root / "test").rename(root / "elsewhere")
    (root / "val").mkdir()
    (root / "test").mkdir()
    for name in ("ant", "bee"):
        (root / "val" / name).symlink_to(root / "elsewhere" / name)
        (root / "test" / name).symlink_to(root / "test" / name)
    assert len(load_test("imagefolder", root)[1]) == 4


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(root, mode):
    suffix = "jpg" if mode == "CMYK" else "png"
    write_image(root / "train" / "ant" / f"5.{suffix}", mode=mode)
    assert load(root).train.images.shape == (9, 3, 8, 8)


def test_image_size_resizes_and_cuts_the_centre(root):
    # Three vertical bands; the square keeps the middle one.
    bands = np.zeros((8, 24, 3), dtype=np.uint8)
    bands[:, 8:16], bands[:, 16:] = 100, 200
    Image.fromarray(bands).save(root / "train" / "ant" / "0.png")
    splits = load(root, image_size=8)
    assert splits.info.image_shape == (3, 8, 8)
    assert (splits.train.images[0] == 100).all()
    assert load(root, image_size=4).train.images.shape == (8, 3, 4, 4)
    assert load_test("imagefolder", root, image_size=4)[1].images.shape == (4, 3, 4, 4)


def test_decoding_spans_many_tasks(root, monkeypatch):
    expected = load(root).train.images
    monkeypatch.setattr(imagefolder, "DECODE_CHUNK", 1)
    assert torch.equal(load(root).train.images, expected)


def test_mixed_sizes(root):
    write_image(root / "train" / "bee" / "2.png", size=(9, 7))
    with pytest.raises(UserError, match=r"bee.2.png' is 7x9 but the first image is 8x8; pass --image-size"):
        load(root)


def test_truncated_file_is_named(root):
    path = root / "train" / "bee" / "1.jpg"
    write_image(path, size=(8, 8))
    path.write_bytes(path.read_bytes()[:-80])
    with pytest.raises(
        UserError, match=r"cannot decode image '.*bee.1.jpg' \(.*(?i:truncated).*\); replace or remove"
    ):
        load(root)


def test_file_that_is_no_image_is_named(root):
    (root / "test" / "ant" / "2.png").write_text("hello")
    with pytest.raises(UserError, match=r"cannot decode image '.*ant.2.png' \(cannot identify"):
        load_test("imagefolder", root)


def test_first_bad_file_is_the_one_named(root):
    for name in ("0", "1", "2"):
        (root / "train" / "bee" / f"{name}.png").write_text("hello")
    for _ in range(5):
        with pytest.raises(UserError, match=r"bee.0\.png"):
            load_train("imagefolder", root, val_size=0, seed=0, image_size=8)


def test_empty_class_folder(root):
    (root / "train" / "cat").mkdir()
    with pytest.raises(UserError, match=r"class folder '.*cat' holds no image"):
        load(root)


def test_no_train_folder(root):
    shutil.rmtree(root / "train")
    with pytest.raises(UserError, match=r"no folder '.*train'; --data-dir DIR must hold train/CLASS/\*.jpg"):
        load(root)


def test_no_test_folder(root):
    shutil.rmtree(root / "test")
    with pytest.raises(
        UserError, match="holds no test images; --data-dir DIR must hold one of test, val, valid"
    ):
        load_test("imagefolder", root)


def test_classes_of_train_and_test_differ(root):
    (root / "test" / "bee").rename(root / "test" / "wasp")
    with pytest.raises(UserError, match="class folder 'bee' is in only one of the training and test folders"):
        load_test("imagefolder", root)


def test_one_class_is_not_enough(root):
    shutil.rmtree(root / "train" / "bee")
    with pytest.raises(UserError, match=r"holds 1 class folder\(s\); classification needs at least 2"):
        load(root)


@pytest.mark.parametrize("data_dir", [None, "no/such/folder"])
def test_no_data_dir(data_dir):
    with pytest.raises(UserError, match="--data imagefolder needs --data-dir DIR"):
        load_train("imagefolder", data_dir, val_size=0, seed=0)


def test_store_larger_than_half_of_the_memory(root, monkeypatch):
    monkeypatch.setattr(room, "available_memory", lambda: 3000)
    with pytest.raises(
        UserError, match=r"8 images of 8x8 take .* GiB, more than half of .* pass a smaller --image-size"
    ):
        load(root)
    monkeypatch.setattr(room, "available_memory", lambda: None)
    load(root)


def test_available_memory_respects_the_container(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:    50 kB\n")
    monkeypatch.setattr(room, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(room, "CGROUP", tmp_path)
    assert room.available_memory() == 50 * 1024
    (tmp_path / "memory.current").write_text("9000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 2000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert room.available_memory() == 50 * 1024
    (tmp_path / "memory.max").write_text("10000\n")
    assert room.available_memory() == 3000
    monkeypatch.setattr(room, "MEMINFO", tmp_path / "missing")
    assert room.available_memory() == 3000


@pytest.mark.skipif(
    JPEG_ROOT is None, reason="FASTDYNAT_CIFAR10_JPEG does not name a folder of CIFAR-10 as JPEG"
)
def test_cifar10_as_jpeg():
    info, test = load_test("imagefolder", JPEG_ROOT)
    assert info.image_shape == (3, 32, 32)
    assert info.class_names[0] == "airplane"
    assert len(test) == 10_000
    assert info.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=0.015)
    assert info.std == pytest.approx((0.2470, 0.2435, 0.2616), abs=0.01)
    assert torch.bincount(test.labels[:1000]).tolist() == [100] * 10
