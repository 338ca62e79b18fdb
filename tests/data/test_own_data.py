"""Data of the user: accepted forms, and refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fastdynat.data import load_test, open_train
from fastdynat.data.own_data import check_logit_count, given_data, own_data, own_parts
from fastdynat.errors import UserError
from fastdynat.user_code import pin

MADE = """\
import torch


def first():
    part = (torch.full((3, 3, 4, 5), {level}, dtype=torch.uint8), torch.arange(3))
    return part, part


second = first
"""
LABELS = torch.arange(12) % 3


def images(*shape: int) -> Tensor:
    return torch.randint(
        0, 256, (12, *(shape or (3, 4, 5))), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


class Pictures:
    """Items (PIL image, int), as torchvision's data sets have without a transform."""

    def __init__(self, mode: str = "RGB", transform: Any = None) -> None:
        self.mode, self.transform = mode, transform or (lambda image: image)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Any, int]:
        pixels = images()[index].permute(1, 2, 0).numpy()
        return self.transform(Image.fromarray(pixels).convert(self.mode)), int(LABELS[index])


@pytest.mark.parametrize(
    "data",
    [
        (images(), LABELS),
        (images().double() / 255, LABELS.int()),
        (images().numpy(), LABELS.numpy()),
        [images(), LABELS],
        TensorDataset(images(), LABELS),
        TensorDataset(images().float() / 255, LABELS),
        Pictures(),
        {"train": Pictures(), "classes": ["a", "b", "c"]},
    ],
)
def test_every_form_gives_the_same_images(data: object) -> None:
    own = own_parts(data, "data")
    assert torch.equal(own.train.images, images())
    assert torch.equal(own.train.labels, LABELS)
    assert own.info.image_shape == (3, 4, 5)
    assert own.info.num_classes == 3
    assert own.info.augment == "none"


def test_parts_and_their_use() -> None:
    parts = {
        "train": (images(), LABELS),
        "val": (images()[:3], LABELS[:3]),
        "test": (images()[3:9], LABELS[3:9]),
    }
    with given_data(own_parts(parts, "data")) as name:
        split = open_train(name, None, val_size=None, seed=0)
        assert torch.equal(split.train_images().images, images())
        assert torch.equal(split.val_images().images, images()[:3])
        few = open_train(name, None, val_size=None, seed=0, limit=6)
        assert torch.bincount(few.train_images().labels).tolist() == [2, 2, 2]
        assert torch.equal(load_test(name, None)[1].images, images()[3:9])
        with pytest.raises(
            UserError, match="val_size 4: data has its own validation images; leave val_size out"
        ):
            open_train(name, None, val_size=4, seed=0)
        with pytest.raises(UserError, match="image_size 8: images of your own data are not resized"):
            open_train(name, None, val_size=None, seed=0, image_size=8)
    with pytest.raises(UserError, match="object:data is data that was given to"):
        open_train(name, None, val_size=None, seed=0)
    with given_data(own_parts(((images(), LABELS), (images()[:3], LABELS[:3])), "data")) as name:
        assert len(load_test(name, None)[1]) == 3
        split = open_train(name, None, val_size=3, seed=0)
        assert (len(split.train), len(split.val)) == (9, 3)
    with (
        given_data(own_parts((images(), LABELS), "data")) as name,
        pytest.raises(UserError, match="data has no test images; return a dict with train and test"),
    ):
        load_test(name, None)


def test_rounding_to_8_bits_is_said() -> None:
    with pytest.warns(UserWarning, match="kept with 8 bits per channel, which moves values by up to 0.002"):
        own_parts((torch.rand(12, 3, 4, 5), LABELS), "data")
    rounded = torch.rand(12, 3, 4, 5)
    parts = {
        "train": (images().float() / 255, LABELS),
        "val": (rounded, LABELS),
        "test": (rounded / 2, LABELS),
    }
    with pytest.warns(UserWarning, match="8 bits") as caught:
        own_parts(parts, "data")
    (found,) = caught
    assert str(found.message).endswith("; pass uint8 images to avoid this")
    assert found.filename == __file__
    moved = max((255 * x - (255 * x).round()).abs().max().item() / 255 for x in (rounded, rounded / 2))
    assert f"moves values by up to {moved:.2g};" in str(found.message)


class Sizes:
    """Items of growing width."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.zeros(3, 4, 4 + index, dtype=torch.uint8), index


class Endless(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(())


def normalised(low: float, high: float) -> Tensor:
    x = torch.rand(12, 3, 4, 5)
    x[0, 0, 0, 0], x[0, 0, 0, 1] = low, high
    return x


class Flipped(TensorDataset):
    """Images that are mirrored at random; seldom the first one."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        image, label = super().__getitem__(index)
        return (image.flip(-1) if index and torch.rand(()) < 0.5 else image), label


class Broken(TensorDataset):
    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        if index == 11:
            raise OSError("truncated file")
        return super().__getitem__(index)


REFUSED: dict[str, tuple[Any, str]] = {
    "overshoot": (
        (normalised(-0.01, 1.0000002), LABELS),
        r"got \[-0\.00.*, 1\.0000002\]; use images.clamp\(0, 1\)",
    ),
    "labels in a column": ((images(), LABELS[:, None]), r"got int64 \(12, 1\); use labels.squeeze\(1\)"),
    "labels in a list": ((images(), LABELS.tolist()), r"the labels are a list; use torch.tensor\(labels\)"),
    "huge label": (
        (images(), LABELS * 10**9),
        "label 2000000000 is beyond 1,000,000 classes; number the classes",
    ),
    "objects": ((images().numpy().astype(object), LABELS), "an array of object holds no images"),
    "label names": ((images(), np.array(["a"] * 12)), "an array of <U1 holds no images or labels"),
    "sparse": ((images().float().to_sparse(), LABELS), "a torch.sparse_coo tensor on cpu cannot be read"),
    "meta": ((images().to("meta"), LABELS), "tensor on meta cannot be read"),
    "random flip": (Flipped(images(), LABELS), r"image \d+ changes each time it is read"),
    "unreadable item": (Broken(images(), LABELS), "reading item 11 failed: OSError: truncated file .*py:"),
    "normalised": (
        (normalised(-2, 2), LABELS),
        r"in \[0, 1\], got \[-2, 2\]; put the normalisation into the",
    ),
    "0 to 255": ((normalised(0, 200), LABELS), r"in \[0, 1\], got \[0, 200\]; divide by 255"),
    "not a number": ((normalised(0, float("nan")), LABELS), r"in \[0, 1\], got \[nan, nan\]"),
    "int64 images": ((images().long(), LABELS), r"must be uint8 or floats in \[0, 1\], got int64"),
    "channels last": ((images(8, 9, 3), LABELS), r"\(12, 8, 9, 3\), channels last; .*permute\(0, 3, 1, 2\)"),
    "no channels": (
        (images(8, 9), LABELS),
        r"must be \(N, C, H, W\), got uint8 \(12, 8, 9\); add the channels",
    ),
    "negative label": ((images(), LABELS - 1), r"label -1 at index 0 is outside \[0, 2\)"),
    "label too large": (
        {"train": (images(), LABELS), "classes": 2},
        r"data \(train\): label 2 at index 2 is outside \[0, 2\)",
    ),
    "float labels": ((images(), LABELS.float()), r"labels must be whole numbers \(N,\), got float32 \(12,\)"),
    "one-hot": (
        (images(), torch.eye(12, 3, dtype=torch.int64)),
        r"labels must be whole numbers \(N,\), got int64 \(12, 3\); of one-hot rows use labels.argmax\(1\)$",
    ),
    "float one-hot": (
        (images(), torch.eye(12, 3)),
        r"float32 \(12, 3\); of one-hot rows use labels.argmax\(1\)$",
    ),
    "float column": ((images(), LABELS[:, None].float()), r"; use labels.squeeze\(1\).long\(\)$"),
    "float labels of numpy": (
        (images(), LABELS.float().numpy()),
        r"got float32 \(12,\); use labels.astype\(\"int64\"\)$",
    ),
    "channels last of numpy": (
        (images(8, 9, 3).numpy(), LABELS),
        r"\(12, 8, 9, 3\), channels last; .*: images.transpose\(0, 3, 1, 2\)$",
    ),
    "int64 images of numpy": ((images().long().numpy(), LABELS), r"; use images.astype\(\"uint8\"\)$"),
    "overshoot of numpy": ((normalised(0, 1.001).numpy(), LABELS), r"; use images.clip\(0, 1\)$"),
    "fewer labels": ((images(), LABELS[:11]), "12 images but 11 labels"),
    "no images": ((images()[:0], LABELS[:0]), "data has no images"),
    "three parts": (((images(), LABELS), (images(), LABELS), (images(), LABELS)), "of 3 parts is ambiguous"),
    "unknown part": ({"train": (images(), LABELS), "valid": 1}, "unknown key 'valid' in the dict"),
    "no train": ({"test": (images(), LABELS)}, "no 'train' in the dict"),
    "other test size": (
        {"train": (images(), LABELS), "test": (images(3, 5, 5), LABELS)},
        r"test images are \(3, 5, 5\), training images \(3, 4, 5\)",
    ),
    "loader": (DataLoader(TensorDataset(images(), LABELS)), "is a DataLoader; give its dataset"),
    "iterable": (Endless(), "without a length"),
    "a number": (3, "is a int, not data; give"),
    "items": (TensorDataset(images()), "item 0 is a tuple, not a pair"),
    "random transform": (
        Pictures(transform=lambda image: torch.rand(3, 4, 5)),
        "image 0 changes each time it is read",
    ),
    "mode": (Pictures("RGBA"), "image 0 has mode RGBA; convert it to RGB or L"),
    "items of two sizes": (
        Sizes(),
        r"image 1 is uint8 \(3, 4, 5\), image 0 uint8 \(3, 4, 4\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_data_is_refused_in_one_line(case: str) -> None:
    data, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as caught:
        own_parts(data, "data")
    assert "\n" not in str(caught.value)


def test_uint8_images_without_values_above_1_are_said() -> None:
    with pytest.warns(UserWarning, match="no pixel of the uint8 images is above 1 of 255"):
        own_parts((images() // 128, LABELS), "data")


def test_mirrored_arrays_and_numpy_class_counts() -> None:
    own = own_parts({"train": (images().numpy()[::-1], LABELS.numpy()[::-1]), "classes": np.int64(4)}, "data")
    assert torch.equal(own.train.images, images().flip(0))
    assert torch.equal(own.train.labels, LABELS.flip(0))
    assert own.info.num_classes == 4


def test_classes_and_logits() -> None:
    own = own_parts((images(), LABELS), "data")
    check_logit_count(own, 3)
    with pytest.raises(
        UserError, match="3 classes, labels 0 to 2, but the network has 2 logits: give its last layer 3"
    ):
        check_logit_count(own, 2)
    with pytest.raises(UserError, match='"classes": 5'):
        check_logit_count(own, 5)
    check_logit_count(own_parts({"train": (images(), LABELS), "classes": 5}, "data"), 5)


def test_code_is_known_by_its_function_and_content_in_any_folder(tmp_path: Path) -> None:
    files = [tmp_path / folder / "mine.py" for folder in ("plain", "issue #7", "a#sha256=b")]
    for file in files:
        file.parent.mkdir()
        file.write_text(MADE.format(level=7))

    def origin(name: str) -> tuple[str, str]:
        found = own_data(name).info.test_origin
        assert found is not None
        return found

    first = {origin(name) for file in files for name in (f"{file}:first", pin(f"{file}:first"))}
    second = {origin(name) for file in files for name in (f"{file}:second", pin(f"{file}:second"))}
    assert len(first) == len(second) == 1
    assert first != second


def test_a_file_that_has_changed_is_read_again_in_any_folder(tmp_path: Path) -> None:
    """Only a pinned name names content, too."""
    file = tmp_path / "issue #7" / "mine.py"
    file.parent.mkdir()
    for level in (7, 8):
        file.write_text(MADE.format(level=level) + "#" * level)
        assert own_data(f"{file}:first").train.images.unique().tolist() == [level]
