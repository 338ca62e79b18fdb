"""Random resized crops: torchvision's boxes and pixels, of files in every loader that can read them so."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.loaders import DALI, make
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from fastdynat.commands.main import main
from fastdynat.data import choose_loader, open_train
from fastdynat.data.augmentation.resized_crop import NUMBERS, ResizedCrop
from fastdynat.data.hugging_face import TableImages
from fastdynat.data.imagefolder import FileSet
from fastdynat.data.mixing import Mixing

CROP = ResizedCrop()
STREAMING = ["torch", "torch-0", pytest.param("dali", marks=DALI)]


@pytest.mark.parametrize("size", [(224, 224), (40, 30), (60, 300), (300, 20)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.5, 0.8)])
def test_boxes_follow_torchvision(size: tuple[int, int], scale: tuple[float, float]) -> None:
    theirs_of = v2.RandomResizedCrop(32, scale=scale)
    torch.manual_seed(0)
    image = torch.zeros(3, *size)
    made = [theirs_of.make_params([image]) for _ in range(3000)]
    theirs = np.array([[m["top"], m["left"], m["height"], m["width"]] for m in made])
    crop = ResizedCrop(scale)
    ours = np.array([cut(*size) for cut in crop.cuts(torch.arange(3000), seed=1, epoch=0)])
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= size).all()
    assert np.allclose(ours.mean(0), theirs.mean(0), rtol=0.06, atol=0.4)
    assert np.allclose(ours.std(0), theirs.std(0), rtol=0.08, atol=0.4)


@pytest.mark.parametrize("size", [(10, 200), (200, 10), (31, 7)])
def test_without_a_box_that_fits_it_is_torchvisions_at_the_centre(size: tuple[int, int]) -> None:
    made = v2.RandomResizedCrop(8, scale=(1.0, 1.0)).make_params([torch.zeros(3, *size)])
    box = ResizedCrop((1.0, 1.0)).box([0.4] * NUMBERS, *size)
    assert box == (made["top"], made["left"], made["height"], made["width"])


def folder(root: Path, count: int = 12) -> Path:
    """JPEGs of many sizes."""
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                small = Image.fromarray(random.integers(0, 256, (5, 6, 3), dtype=np.uint8))
                image = small.resize((40 + 3 * index, 60 - 2 * index), Image.Resampling.BICUBIC)
                image.save(root / split / name / f"{index:02}.jpg")
    return root


def opened(root: Path) -> FileSet:
    return open_train("imagefolder", root, val_size=4, seed=0, image_size=24).train_files()  # type: ignore[return-value]


@pytest.mark.parametrize("loader", STREAMING)
def test_files_are_cut_as_torchvision_cuts_them(loader: str, tmp_path: Path) -> None:
    files = opened(folder(tmp_path))
    made = make(loader, files, augment="none", resized_crop=CROP, drop_last=True)
    batches = list(made.epoch(2))
    at = 0
    for batch in batches:
        cuts = CROP.cuts(torch.arange(at, at + 8), seed=5, epoch=2)
        at += 8
        for x, index, cut in zip(batch.x, batch.indices.tolist(), cuts, strict=True):
            image = Image.open(files.paths[index].decode()).convert("RGB")
            box = cut(image.height, image.width)
            want = F.resized_crop(image, *box, size=[24, 24], interpolation=InterpolationMode.BILINEAR)
            assert torch.equal(x, torch.from_numpy(np.array(want)).permute(2, 0, 1) / torch.tensor(255.0))
    assert torch.equal(next(made.epoch(2, 1)).x, batches[1].x)


@pytest.mark.parametrize("loader", STREAMING)
def test_loaders_of_files_agree_with_everything_else(loader: str, tmp_path: Path) -> None:
    files = opened(folder(tmp_path))
    given = {"augment": "flip", "resized_crop": CROP, "mixing": Mixing(2, cutmix=1.0)}
    whole = list(make("torch-0", files, **given).epoch(1))
    for rank in range(2):
        part = list(make(loader, files, **given, ranks=2, rank=rank).epoch(1))
        for own, batch in zip(part, whole, strict=True):
            assert torch.equal(own.x, batch.x[torch.tensor([*own.share.positions])])


def test_rows_of_a_table_are_cut() -> None:
    def encoded(index: int) -> bytes:
        pixels = np.random.default_rng(index).integers(0, 256, (20 + index, 30, 3), dtype=np.uint8)
        file = BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    table = [{"image": {"bytes": encoded(index), "path": None}} for index in range(4)]
    images = TableImages(table, "table", torch.arange(4), torch.zeros(4).long(), (3, 12, 12), 12)
    cuts = CROP.cuts(torch.arange(4), seed=1, epoch=1)
    found = images.read(torch.tensor([2, 0]), [cuts[0], cuts[1]])
    for got, index, cut in zip(found, (2, 0), cuts, strict=False):
        image = Image.open(BytesIO(encoded(index)))
        want = F.resized_crop(image, *cut(20 + index, 30), size=[12, 12])
        assert torch.equal(got, torch.from_numpy(np.array(want)).permute(2, 0, 1))
    made = make("torch-0", images, batch_size=4, augment="none", resized_crop=CROP)
    assert next(made.epoch(0)).x.shape == (4, 3, 12, 12)


def test_the_choice_of_a_loader(tmp_path: Path) -> None:
    split = open_train("imagefolder", folder(tmp_path), val_size=4, seed=0, image_size=24)
    assert choose_loader(split, torch.device("cpu"))[0] == "resident"
    assert choose_loader(split, torch.device("cpu"), cuts_files=True)[0] in ("dali", "torch")
    assert choose_loader(split, torch.device("cuda"), cuts_files=True)[0] == "torch"


def test_a_resident_loader_of_files_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "images")
    train = ["train", "--data", "imagefolder", "--data-dir", str(root), "--image-size", "24", "--method"]
    train += ["madry", "--model", "small", "--val-size", "4", "--batch-size", "4", "--epochs", "1"]
    train += ["--scale", "0.3", "1", "--steps", "1", "--run-dir", str(tmp_path / "run")]
    assert main([*train, "--loader", "resident"]) == 2
    assert "scale 0.3 1 crops the original images in their files" in capsys.readouterr().err
    assert main([*train, "--loader", "torch", "--workers", "0", "--quiet"]) == 0
