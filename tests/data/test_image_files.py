"""Every kind of image file through every loader: right 8-bit values, or an early refusal by name."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import needs
from PIL import Image

from fastdynat.commands.main import main
from fastdynat.data import (
    TrainSplit,
    choose_loader,
    load_test,
    make_loader,
    open_train,
    survey,
)
from fastdynat.data.decode import read_header, read_rgb
from fastdynat.errors import UserError
from fastdynat.machine import free_memory as room
from fastdynat.terminal.messages import MessageCollector

HEIGHT, WIDTH = 11, 13
GREY = np.linspace(0, 255, HEIGHT * WIDTH).round().astype(np.uint8).reshape(HEIGHT, WIDTH)
COLOUR = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=2)
DEEP = np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH, 3))
DEEP[0, :4, 0] = 0, 65535, 128, 129  # 128 / 257 rounds to 0, 129 / 257 to 1
DALI = needs("dali")
STREAMING = ["torch", pytest.param("dali", marks=DALI)]
TINY = [
    "--val-size",
    "2",
    "--batch-size",
    "4",
    "--steps",
    "1",
    "--epochs",
    "1",
    "--method",
    "madry",
    "--quiet",
]
TINY += ["--model", "small"]


def rounded(values: np.ndarray) -> np.ndarray:
    """16 bits as 8, in float64."""
    return np.round(values / 257.0).astype(np.uint8)


def write_deep_png(path: Path, values: np.ndarray) -> None:
    """(H, W, 1..4) 0..65535 as PNG with 16 bits per channel, which Pillow cannot write in colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    colour = {1: 0, 2: 4, 3: 2, 4: 6}[values.shape[2]]
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def folder(root: Path, count: int = 4) -> Path:
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                Image.fromarray(np.roll(COLOUR, index, 0)).save(root / split / name / f"{index}.png")
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return folder(tmp_path / "data")


def opened(root: Path, **options: object) -> TrainSplit:
    return open_train("imagefolder", root, val_size=0, seed=0, **options)


def said(root: Path, **options: object) -> str:
    with MessageCollector() as heard:
        opened(root, **options)
    return "\n".join(heard.texts)


def three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


# Content of a file, by name, and the RGB that it stands for.


def _make_deep(channels: slice):
    return lambda path: write_deep_png(path, DEEP[..., channels])


def _with_alpha(path: Path) -> None:
    Image.fromarray(np.dstack([COLOUR, GREY])).save(path)


def _grey_with_alpha(path: Path) -> None:
    Image.fromarray(np.dstack([GREY, GREY[::-1]]), "LA").save(path)


def _pgm_with_maximum_1000(path: Path) -> None:
    values = (DEEP[..., 0] % 1001).astype(">u2")
    path.write_bytes(b"P5\n%d %d\n1000\n" % (WIDTH, HEIGHT) + values.tobytes())


def _save(mode: str, **options: object):
    return lambda path: Image.fromarray(COLOUR).convert(mode).save(path, **options)


BITS = np.asarray(Image.fromarray(COLOUR).convert("1"))
KINDS = {
    "rgb.png": (_save("RGB"), COLOUR),
    "rgb.bmp": (_save("RGB"), COLOUR),
    "rgb.ppm": (_save("RGB"), COLOUR),
    "rgb.tif": (_save("RGB"), COLOUR),
    "lzw.tiff": (_save("RGB", compression="tiff_lzw"), COLOUR),
    "rgb.webp": (_save("RGB", lossless=True), COLOUR),
    "grey.pgm": (lambda path: Image.fromarray(GREY).save(path), three(GREY)),
    "grey.gif": (lambda path: Image.fromarray(GREY).save(path), three(GREY)),
    "bits.png": (_save("1"), three(np.where(BITS, 255, 0).astype(np.uint8))),
    "bits.tif": (_save("1"), three(np.where(BITS, 255, 0).astype(np.uint8))),
    "alpha.png": (_with_alpha, COLOUR),
    "alpha.tif": (_with_alpha, COLOUR),
    "grey_alpha.png": (_grey_with_alpha, three(GREY)),
    "deep_grey.png": (_make_deep(slice(0, 1)), three(rounded(DEEP[..., 0]))),
    "deep_grey_alpha.png": (_make_deep(slice(0, 2)), three(rounded(DEEP[..., 0]))),
    "deep.png": (_make_deep(slice(0, 3)), rounded(DEEP)),
    "deep_grey.tif": (
        lambda p: Image.fromarray(DEEP[..., 0].astype(np.uint16)).save(p),
        three(rounded(DEEP[..., 0])),
    ),
    "deep_grey.pgm": (
        lambda p: Image.fromarray(DEEP[..., 0].astype(np.int32), "I").save(p),
        three(rounded(DEEP[..., 0])),
    ),
    "maximum_1000.pgm": (
        _pgm_with_maximum_1000,
        three(np.round((DEEP[..., 0] % 1001) * 255 / 1000).astype(np.uint8)),
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_values(name: str, tmp_path: Path) -> None:
    write, expected = KINDS[name]
    write(tmp_path / name)
    header = read_header(tmp_path / name)
    assert header.size == (HEIGHT, WIDTH)
    assert header.deep == ("deep" in name or name == "maximum_1000.pgm")
    assert header.alpha == ("alpha" in name)
    # 1000 does not divide 65535, so Pillow's way by 16 bits may round the other way at a tie.
    tolerance = 1 if name == "maximum_1000.pgm" else 0
    assert (
        np.abs(read_rgb(tmp_path / name, None).transpose(1, 2, 0).astype(int) - expected).max() <= tolerance
    )


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "jpe", "jfif", "JPG"])
def test_every_suffix_of_jpeg_is_taken(suffix: str, root: Path) -> None:
    Image.fromarray(COLOUR).save(root / "train" / "ant" / f"x.{suffix}", "JPEG")
    assert len(opened(root).train) == 9


def _planar_float(path: Path) -> None:
    Image.fromarray(GREY.astype(np.float32)).save(path)


REFUSED = {
    "float.tif": (_planar_float, "has floating-point values"),
    "long.tif": (
        lambda path: Image.fromarray(GREY.astype(np.int32), "I").save(path),
        "has signed or 32-bit values",
    ),
    "avif.png": (
        lambda path: Image.fromarray(COLOUR).save(path, "AVIF"),
        "cannot identify it as one of JPEG",
    ),
    "empty.png": (lambda path: path.write_bytes(b""), "cannot identify"),
    "page.jpg": (lambda path: path.write_text("<html>404</html>"), "cannot identify"),
    "pipe.png": (os.mkfifo, "is no regular file"),
    "lost.png": (lambda path: path.symlink_to("nowhere"), "No such file"),
}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_named_before_training(
    name: str, split: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write, message = REFUSED[name]
    write(root / split / "bee" / name)
    code = main(
        ["train", "--run-dir", str(tmp_path / "run"), *TINY, "--data", "imagefolder", "--data-dir", str(root)]
    )
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2
    assert name in error
    assert message in error
    assert not (tmp_path / "run").exists()


def test_sixteen_bits_after_an_eight_bit_file_do_not_become_white(root: Path) -> None:
    write_deep_png(root / "train" / "ant" / "9.png", DEEP)
    split = opened(root)
    assert torch.equal(
        split.train_images().images[-1], torch.from_numpy(rounded(DEEP).transpose(2, 0, 1).copy())
    )
    assert torch.equal(split.train_files().read(torch.tensor([8])), split.train_images().images[-1:])
    assert "1 of 8" not in said(root)
    assert "1 of 9 images in" in said(root)
    assert "have 16 bits per channel, which are rounded to 8 (first: 'ant/9.png')" in said(root)


# Loaders agree.


def _batches(loader: str, split: TrainSplit) -> list[torch.Tensor]:
    options = {"batch_size": 3, "augment": "crop-flip", "seed": 1, "device": "cpu", "workers": 1}
    images = split.train_images() if loader == "resident" else split.train_files()
    return [batch.x for batch in make_loader(loader, images, **options).epoch(0)]


def _turned(path: Path, **options: object) -> None:
    tag = Image.Exif()
    tag[0x112] = 6
    Image.fromarray(COLOUR).save(path, exif=tag, **options)


READ_BY_ALL = {
    **{
        name: KINDS[name][0]
        for name in ("rgb.png", "rgb.bmp", "rgb.ppm", "rgb.webp", "grey.pgm", "bits.png", "alpha.png")
    },
    "turned.jpg": _turned,
    "turned.png": _turned,
    "cmyk.jpg": _save("CMYK"),
    "grey.jpg": _save("L"),
    "progressive.jpg": _save("RGB", progressive=True, subsampling=2),
    "rgb_coded.jpg": _save("RGB", keep_rgb=True, subsampling=0),
    "palette.png": lambda path: Image.fromarray(COLOUR).quantize(13).save(path, bits=4),
    "key.png": lambda path: Image.fromarray(COLOUR).quantize(13).save(path, transparency=3),
    "really_a_png.jpg": _save("RGB", format="PNG"),
    "really_a_jpeg.png": _save("RGB", format="JPEG"),
}
NOT_BY_DALI = {
    **{
        name: KINDS[name][0]
        for name in ("rgb.tif", "grey.gif", "deep.png", "deep_grey.png", "deep_grey.pgm", "maximum_1000.pgm")
    },
    "really_a_gif.png": _save("P", format="GIF"),
    "turned.webp": lambda path: _turned(path, lossless=True),
    "frames.webp": lambda path: Image.fromarray(COLOUR).save(
        path, save_all=True, append_images=[Image.fromarray(COLOUR[::-1])], lossless=True
    ),
    "small_maximum.ppm": lambda path: path.write_bytes(
        b"P6\n%d %d\n100\n" % (WIDTH, HEIGHT) + (COLOUR // 3).tobytes()
    ),
}


@pytest.mark.parametrize("image_size", [None, 6, 17])
@pytest.mark.parametrize("loader", STREAMING)
def test_every_loader_gives_the_values_of_the_store(loader: str, image_size: int | None, root: Path) -> None:
    for name, write in READ_BY_ALL.items():
        write(root / "train" / "ant" / name)
    split = opened(root, image_size=image_size)
    for got, expected in zip(_batches(loader, split), _batches("resident", split), strict=True):
        assert torch.equal(got, expected)


@DALI
@pytest.mark.parametrize("name", NOT_BY_DALI)
def test_dali_refuses_what_it_reads_differently(
    name: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    NOT_BY_DALI[name](root / "train" / "ant" / name)
    split = opened(root)
    data = ["--data", "imagefolder", "--data-dir", str(root), "--val-size", "0", "--loader", "dali"]
    assert main(["train", "--run-dir", str(tmp_path / "run"), *TINY, *data]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert name in error
    assert "use --loader torch" in error
    assert not (tmp_path / "run").exists()
    # The advice is right, and what auto follows where the images do not fit in memory.
    for got, expected in zip(_batches("torch", split), _batches("resident", split), strict=True):
        assert torch.equal(got, expected)
    monkeypatch.setattr(room, "available_memory", lambda: 1)
    chosen, why = choose_loader(split, torch.device("cpu"))
    assert chosen == "torch"
    assert name in why


@pytest.mark.parametrize("loader", ["resident", *STREAMING])
def test_an_exif_rotation_is_said_and_not_applied(loader: str, root: Path) -> None:
    _turned(root / "train" / "ant" / "9.jpg", quality=100)
    assert "1 of 9 images" in said(root)
    assert "EXIF rotation, which is not applied" in said(root)
    assert [batch.shape[2:] for batch in _batches(loader, opened(root))] == [(HEIGHT, WIDTH)] * 3


def test_transparency_and_frames_are_said(root: Path) -> None:
    _with_alpha(root / "train" / "ant" / "8.png")
    NOT_BY_DALI["frames.webp"](root / "test" / "ant" / "9.webp")
    text = said(root)
    assert "1 of 9 images in" in text
    assert "transparency channel, which is dropped (first: 'ant/8.png')" in text
    assert "several frames, of which the first is read (first: 'ant/9.webp')" in text
    assert said(folder(root.parent / "plain")) == ""


# Files in the folders.


def test_what_is_left_out_is_counted(root: Path) -> None:
    (root / "train" / "loose.jpg").write_text("beside the classes")
    (root / "train" / "ant" / "notes.txt").write_text("no image")
    (root / "train" / "ant" / "more").mkdir()
    (root / "train" / "bee" / "photo.heic").write_text("no image")
    for hidden in (".DS_Store", "Thumbs.db", "desktop.ini", "._0.png"):
        (root / "train" / "bee" / hidden).write_bytes(b"hidden")
    (root / "test" / "bee" / "clip.mp4").write_bytes(b"")
    text = said(root)
    assert "train': 1 .heic, 1 .jpg, 1 .txt, 1 folder(s); images are" in text
    assert "test': 1 .mp4; images are" in text
    assert all(word not in text for word in (".DS_Store", "Thumbs.db", ".db", ".ini"))
    with MessageCollector() as heard:
        load_test("imagefolder", root)
    assert len(heard.texts) == 1
    assert "1 .mp4" in heard.texts[0]


def test_names_of_any_bytes(root: Path) -> None:
    odd = os.fsencode(root / "train" / "ant") + b"/caf\xe9 \xf0\x9f\x90\x9c[b].png"
    Image.fromarray(COLOUR[::-1].copy()).save(root / "x.png")
    os.rename(root / "x.png", odd)
    split = opened(root)
    assert len(split.train_images()) == 9
    assert torch.equal(split.train_files().read(torch.arange(9)), split.train_images().images)
    Path(os.fsdecode(odd)).write_bytes(b"")
    with pytest.raises(UserError, match=r"caf.udce9 .*\[b\].png' \(cannot identify"):
        opened(root)


@pytest.mark.parametrize("name", [b"caf\xe9", b"two\nlines", b"nul\x07"])
def test_class_names_that_no_document_can_hold(name: bytes, root: Path) -> None:
    for split in ("train", "test"):
        os.rename(root / split / "bee", os.fsencode(root / split) + b"/" + name)
    with pytest.raises(UserError, match="has a name that cannot be printed; rename it") as error:
        opened(root)
    assert "\n" not in str(error.value)


def test_links_in_circles(root: Path) -> None:
    (root / "train" / "circle").symlink_to("circle")
    (root / "train" / "ant" / "up").symlink_to("..")
    (root / "train" / "ant" / "self.png").symlink_to("self.png")
    with pytest.raises(UserError, match=r"self.png' \(.*\); replace or remove the file"):
        opened(root)
    (root / "train" / "ant" / "self.png").unlink()
    assert len(opened(root).train) == 8


def test_a_folder_that_may_not_be_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.iterdir

    def refused(self: Path):
        if self.name == "bee":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self)

    monkeypatch.setattr(Path, "iterdir", refused)  # tests may run as root, who may read everything
    with pytest.raises(
        UserError, match=r"cannot read the folder '.*bee' \(Permission denied\); change its permissions"
    ):
        opened(root)


def test_a_file_that_may_not_be_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def refused(self: Path, *args, **kwargs):
        if self.name == "3.png":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(UserError, match=r"ant.3.png' \(Permission denied\); replace or remove the file"):
        opened(root)


# The test folder, before training.


def _empty_class(root: Path) -> str:
    for path in (root / "test" / "bee").iterdir():
        path.unlink()
    return "class folder '.*test/bee' holds no image"


def _missing_class(root: Path) -> str:
    _empty_class(root)
    (root / "test" / "bee").rmdir()
    (root / "test" / "ant" / "x").mkdir()
    return r"test' holds 1 class folder\(s\)"


def _other_class(root: Path) -> str:
    (root / "test" / "bee").rename(root / "test" / "wasp")
    return "class folder 'bee' is in only one of .* '.*test' has none; add it there or remove it"


def _extra_class(root: Path) -> str:
    (root / "test" / "cat").mkdir()
    Image.fromarray(COLOUR).save(root / "test" / "cat" / "0.png")
    return "class folder 'cat' is in only one of .* '.*train' has none"


def _other_size(root: Path) -> str:
    Image.fromarray(COLOUR[1:]).save(root / "test" / "ant" / "9.png")
    return r"test/ant/9.png' is 10x13 but the first image is 11x13; pass --image-size"


def _truncated(root: Path) -> str:
    path = root / "test" / "ant" / "3.png"
    path.write_bytes(path.read_bytes()[:-40])
    return r"cannot decode image '.*test/ant/3.png'"


def _flipped_bits(root: Path) -> str:
    path = root / "test" / "ant" / "3.png"
    data = bytearray(path.read_bytes())
    for index in range(60, 90):
        data[index] ^= 0x55
    path.write_bytes(data)
    return r"cannot decode image '.*test/ant/3.png'"


@pytest.mark.parametrize(
    "damage",
    [_empty_class, _missing_class, _other_class, _extra_class, _other_size, _truncated, _flipped_bits],
)
def test_the_test_folder_is_looked_at_before_training(damage, root: Path) -> None:
    message = damage(root)
    with pytest.raises(UserError, match=message):
        opened(root)


def test_training_goes_on_without_a_test_folder_and_says_so(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (root / "test").rename(root / "elsewhere")
    opened(root)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert (
        "holds no test images; --data-dir DIR must hold one of test, val, valid for fastdynat eval"
        in record.getMessage()
    )


def test_large_splits_are_not_decoded_for_the_look(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "DECODED_BYTES", 100)
    monkeypatch.setattr(survey, "read_rgb", lambda path, size: pytest.fail(f"{path} was decoded"))
    opened(root)
    monkeypatch.undo()
    monkeypatch.setattr(survey, "DECODED_BYTES", 100)
    with pytest.raises(UserError, match=_truncated(root)):  # its end says so
        opened(root)


@pytest.mark.parametrize("damage", [_truncated, _other_size])
def test_a_streamed_training_file_is_looked_at_before_the_first_step(damage, root: Path) -> None:
    message = damage(root).replace("test", "train")
    (root / "train").rename(root / "x")
    (root / "test").rename(root / "train")
    (root / "x").rename(root / "test")
    with pytest.raises(UserError, match=message):
        opened(root)
