"""Survey of a split's files before any work: bad files are refused by name, unusual ones are counted."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastdynat.data.decode import EncodedImage, Header, read_header, read_rgb
from fastdynat.data.read_ahead import pool
from fastdynat.errors import UserError

CHUNK = 64  # files per task: long enough to hide the pool's overhead, short enough to spread
DECODED_BYTES = (
    2**26
)  # of files that are all decoded to see that they can be; of more only the suspicious ones


@dataclass(frozen=True)
class Survey:
    """Common properties of a split's files. dali: by file, why DALI decodes it differently; or ""."""

    notices: tuple[str, ...]
    dali: tuple[str, ...]


def survey(
    paths: Sequence[Path], shape: tuple[int, int, int], image_size: int | None, *, decode: bool
) -> Survey:
    """Read the header of every file, and decode those that look truncated.

    Args:
        shape: (C, H, W) that the images must have, unless `image_size` makes them so.
        decode: also decode every file where they take at most 64 MiB. For a split that is not read at once
            anyway.

    Raises: UserError naming the first file that cannot be read or has another size.
    """
    decode = decode and _small(paths)

    def look(path: Path) -> Header:
        header = read_header(path)
        if image_size is None and header.size != shape[1:]:
            raise other_size(path, header.size, shape)
        if decode or not header.whole:
            read_rgb(path, image_size)
        return header

    headers = list(_each(look, paths))
    return Survey(tuple(_unusual(paths, headers)), tuple(header.dali for header in headers))


def other_size(path: Path | EncodedImage, size: tuple[int, ...], shape: tuple[int, int, int]) -> UserError:
    """The error for an image of `size` (H, W) where the first has `shape` (C, H, W)."""
    return UserError(
        f"{str(path)!r} is {size[0]}x{size[1]} but the first image is {shape[1]}x{shape[2]}; "
        "pass --image-size to resize all of them"
    )


def _small(paths: Sequence[Path]) -> bool:
    total = 0
    for path in paths:
        try:
            total += path.stat().st_size
        except OSError:
            continue  # it will be named where it is opened
        if total > DECODED_BYTES:
            return False
    return True


def _each(look: Callable[[Path], Header], paths: Sequence[Path]) -> Iterator[Header]:
    """Map `look` over the paths in order, so that the first error raised is that of the first bad file."""
    with pool() as threads:
        for found in threads.map(
            lambda start: [*map(look, paths[start : start + CHUNK])], range(0, len(paths), CHUNK)
        ):
            yield from found


def _unusual(paths: Sequence[Path], headers: Sequence[Header]) -> Iterator[str]:
    kinds = {
        "alpha": "a transparency channel, which is dropped",
        "turned": "an EXIF rotation, which is not applied (as in torchvision): "
        "turn the files themselves if it matters",
        "frames": "several frames, of which the first is read",
        "deep": "16 bits per channel, which are rounded to 8",
    }
    for name, what in kinds.items():
        found = [path for path, header in zip(paths, headers, strict=True) if getattr(header, name)]
        if found:
            where = str(found[0].parent.parent)
            yield f"{len(found)} of {len(paths)} images in {where!r} have {what} (first: {_short(found[0])})"


def _short(path: Path) -> str:
    return repr(str(Path(path.parent.name, path.name)))


def files_left_out(folder: Path, names: Counter[str], suffixes: Sequence[str]) -> str:
    """The message about files that are left out, counted by suffix."""
    counts = ", ".join(f"{count} {name}" for name, count in sorted(names.items()))
    return (
        f"left out of {str(folder)!r}: {counts}; images are {', '.join(suffixes)} directly in a class folder"
    )
