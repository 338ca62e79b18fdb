"""Decoder of one image file to 8-bit RGB, shared by all loaders, and reader of its header."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO, cast

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_png

from fastdynat.errors import UserError

# The formats that are read, whatever the file's suffix. Pillow's other readers (EPS starts a program) are
# never tried.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF", "GIF")
DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")  # more than 8 bits per channel
DEEP_TO_EIGHT = 257  # 65535 / 255
ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC = 0x112, 258, 262  # tags of EXIF and TIFF
WHITE_IS_ZERO = 0
# (H, W) of a decoded image -> (top, left, height, width) of the part that is taken.
Cut = Callable[[int, int], tuple[int, int, int, int]]


@dataclass(frozen=True)
class EncodedImage:
    """The bytes of an image file that lies in a table; `name` says where, for messages."""

    data: bytes
    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Header:
    """Header of an image file. size: (height, width)."""

    size: tuple[int, int]
    alpha: bool
    turned: bool  # an EXIF tag asks for a rotation or a mirror image
    frames: bool  # more than one
    deep: bool  # more than 8 bits per channel
    whole: bool  # the file ends as its format does; False is only a suspicion
    dali: str  # why DALI would not give the values of `read_rgb`; "" where it does


def read_header(path: Path) -> Header:
    """Read a file's header. Raises: UserError for a file that cannot be read or cannot become 8-bit RGB."""
    with _opened(path) as (image, file):
        deep, frames = _is_deep(image), _has_frames(image)
        _refuse_unknown_range(image, path)
        # Pillow turns TIFF images itself, and reads a PNG to its end to look for a tag that may come last.
        turned = image.format != "TIFF" and "exif" in image.info and image.getexif().get(ORIENTATION, 1) != 1
        whole = _ends_well(image, file)
        dali = _beyond_dali(image, file, deep=deep, frames=frames)
        return Header((image.height, image.width), _has_alpha(image), turned, frames, deep, whole, dali)


def read_rgb(path: Path | EncodedImage, image_size: int | None) -> np.ndarray:
    """Decode a file to uint8 (3, H, W); `image_size` resizes the shorter side and crops the centre.

    Raises: UserError as `read_image`.
    """
    return np.asarray(fit_square(read_image(path), image_size)).transpose(2, 0, 1)


def read_image(path: Path | EncodedImage) -> Image.Image:
    """Decode a file to 8-bit RGB.

    The rules are those of torchvision's ImageFolder: grey becomes three equal channels, palettes and CMYK
    become RGB, transparency is dropped, an EXIF rotation is not applied, of several frames the first is read.
    But 16 bits become 8 by ``round(value / 257)``, where Pillow's conversion clips.

    Raises: UserError naming a file that cannot be decoded or whose values have no known range.
    """
    with _opened(path) as (image, file):
        _refuse_unknown_range(image, path)
        if image.format == "PNG" and image.mode not in DEEP_MODES and _is_deep(image):
            return _deep_png(file)
        if image.mode in DEEP_MODES:
            values = np.asarray(image).astype(np.int64)
            return Image.fromarray(_to_eight_bits(values)).convert("RGB")
        image.load()
        image.info.pop("transparency", None)  # dropped; Pillow would warn of it
        return image.convert("RGB")


def fit_square(rgb: Image.Image, image_size: int | None) -> Image.Image:
    """Resize the shorter side to `image_size` (bilinear, antialiased) and crop the centre, if not None."""
    if image_size is None or rgb.size == (image_size, image_size):
        return rgb
    scale = image_size / min(rgb.size)
    width, height = (max(image_size, round(side * scale)) for side in rgb.size)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    rgb = rgb.resize((width, height), Image.Resampling.BILINEAR)
    return rgb.crop((left, top, left + image_size, top + image_size))


def cut_out(rgb: Image.Image, cut: Cut, size: tuple[int, int]) -> Image.Image:
    """The part `cut` of an image, resized to `size` (H, W) (bilinear, antialiased)."""
    top, left, height, width = cut(rgb.height, rgb.width)
    part = rgb.crop((left, top, left + width, top + height))
    return part.resize(size[::-1], Image.Resampling.BILINEAR)


@contextmanager
def _opened(path: Path | EncodedImage) -> Iterator[tuple[Image.Image, BinaryIO]]:
    """The image and its file; any exception of the block becomes a UserError that names the file."""
    try:
        with _bytes_of(path) as file, Image.open(file, formats=FORMATS) as image:
            yield image, file
    except UserError:
        raise
    except UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        raise UserError(
            f"cannot decode image {str(path)!r} (cannot identify it as one of {known}); replace or remove "
            f"the file"
        ) from error
    except Exception as error:  # decoders raise many kinds on damaged files
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = (reason.splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot decode image {str(path)!r} ({reason}); replace or remove the file"
        ) from error


def _bytes_of(path: Path | EncodedImage) -> BinaryIO:
    if isinstance(path, EncodedImage):
        return BytesIO(path.data)
    # Opening a pipe would wait for a writer.
    if not S_ISREG(path.stat().st_mode):
        raise UserError(f"{str(path)!r} is no regular file; replace or remove it")
    return path.open("rb")


def _is_deep(image: Image.Image) -> bool:
    """True for more than 8 bits per channel. Pillow shows 16-bit colour only in its decoder's raw mode."""
    return image.mode in DEEP_MODES or (image.format in ("PNG", "TIFF") and ";16" in _coding(image)[1])


def _coding(image: Image.Image) -> tuple[str, str]:
    """Pillow's names for the decoder and for how pixels are packed; empty where there are none (WebP)."""
    tiles = getattr(image, "tile", [])
    return (tiles[0][0], str(tiles[0][3])) if tiles else ("", "")


def _refuse_unknown_range(image: Image.Image, path: Path | EncodedImage) -> None:
    """Raise UserError for values that cannot be scaled to 8 bits, because nothing says what white is."""
    tags = getattr(image, "tag_v2", {})
    problem = ""
    if image.mode == "F":
        problem = "floating-point values"
    elif image.mode == "I" and image.format not in ("PNG", "PPM"):
        problem = "signed or 32-bit values"
    elif image.format == "TIFF" and _is_deep(image):
        if image.mode not in DEEP_MODES:
            problem = "16-bit colour in a TIFF file"
        elif tags.get(BITS_PER_SAMPLE) != (16,) or tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
            problem = "an unusual 16-bit scale"
    if problem:
        raise UserError(f"{str(path)!r} has {problem} (mode {image.mode}): convert it to 8 bits per channel")


def _to_eight_bits(values: np.ndarray) -> np.ndarray:
    """round(value / 257) of 0..65535, as uint8; exact, and never a tie."""
    return ((values + DEEP_TO_EIGHT // 2) // DEEP_TO_EIGHT).astype(np.uint8)


def _deep_png(file: BinaryIO) -> Image.Image:
    """A PNG with 16 bits per channel, of which Pillow would drop the low 8."""
    file.seek(0)
    data = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
    values = decode_png(data, ImageReadMode.RGB).to(torch.int64).permute(1, 2, 0).numpy()
    return Image.fromarray(_to_eight_bits(values))


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info


def _has_frames(image: Image.Image) -> bool:
    # A phone's JPEG holds a second, smaller picture (MPO), which nobody means.
    return image.format != "MPO" and bool(getattr(image, "is_animated", False))


def _ends_well(image: Image.Image, file: BinaryIO) -> bool:
    """True if the file ends with its format's end mark; False for formats without a simple one."""
    mark = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}.get(cast(str, image.format))
    if mark is None:
        return False
    file.seek(0, 2)
    file.seek(max(0, file.tell() - 16))
    return mark in file.read()


def _beyond_dali(image: Image.Image, file: BinaryIO, *, deep: bool, frames: bool) -> str:
    """The reason why DALI (2.4, measured) decodes such files differently from Pillow; "" if it agrees."""
    kind = cast(str, image.format)
    if deep:
        return f"{image.mode} with more than 8 bits per channel"
    if frames:
        return f"{kind} with several frames"
    codec, packing = _coding(image)
    if kind == "WEBP":
        file.seek(12)
        plain = file.read(4) in (b"VP8 ", b"VP8L")
    else:
        plain = {
            "JPEG": image.mode in ("L", "RGB", "CMYK"),
            "MPO": image.mode in ("L", "RGB", "CMYK"),
            "PNG": True,
            "BMP": codec == "raw" and ";15" not in packing and ";16" not in packing,
            "PPM": codec == "raw" and image.mode in ("1", "L", "RGB"),
        }.get(kind, False)
    return "" if plain else f"{kind} of a kind that DALI reads differently or not at all"
