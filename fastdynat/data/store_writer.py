"""Packing: extra images of a published form into a store, which is there as a whole or not at all."""

import fcntl
import glob
import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import IO

import numpy as np

from fastdynat.data.extra_store import (
    CHECKSUMS,
    FORMAT,
    IMAGES,
    LABELS,
    STORE,
    ExtraStore,
    SourceFile,
    StoreFacts,
    is_store,
    total_checksum,
)
from fastdynat.data.pack_sources import PackSource, open_sources
from fastdynat.documents import DocumentError
from fastdynat.errors import UserError
from fastdynat.machine.cache_folder import user_cache
from fastdynat.terminal.progress import ProgressDisplay

logger = logging.getLogger(__name__)

CHUNK_BYTES = 2**22  # of pixels that are in memory at a time, and under one checksum
LABEL_BYTES = 4
GIB = 2**30


def packed(
    path: Path,
    image_size: int | None,
    display: ProgressDisplay,
    check_source: Callable[[PackSource], None],
) -> ExtraStore:
    """The store at `path`, or the store of the file or folder at `path`, which is packed if it is not yet.

    The store is beside the source; where that folder cannot be written to it is in the user's cache.

    check_source: raises UserError for a source that the caller cannot use, before it is packed.

    Raises: UserError as `open_sources` and `pack`.
    """
    if is_store(path):
        return ExtraStore(path)
    places = _places(path, image_size)
    if not path.exists():
        for place in filter(is_store, places):
            logger.info("%s no longer exists: using its store %s", path, place)
            return ExtraStore(place)
        raise DocumentError(f"cannot read {path}: there is no such file or folder")
    sources = open_sources([path], image_size)
    check_source(sources[0])
    for place in filter(is_store, places):
        if _packs(ExtraStore(place), sources):
            return ExtraStore(place)
    out = next((place for place in places if os.access(place.parent, os.W_OK)), places[-1])
    out.parent.mkdir(parents=True, exist_ok=True)
    logger.info("packing %s into %s, which later runs use", path, out)
    return pack(sources, out, image_size=image_size, overwrite=True, display=display)


def default_place(path: Path, image_size: int | None) -> Path:
    """The store of the file or folder at `path`, beside it."""
    size = "" if image_size is None or not path.is_dir() else f"-{image_size}"
    whole = path.absolute()
    return whole.with_name(f"{whole.name}.packed{size}")


def _places(path: Path, image_size: int | None) -> list[Path]:
    beside = default_place(path, image_size)
    cache = user_cache("extra")
    digest = hashlib.sha256(os.fsencode(beside)).hexdigest()[:8]
    return [beside, *([] if cache is None else [cache / f"{digest}-{beside.name}"])]


def pack(
    sources: Sequence[PackSource],
    out: Path,
    *,
    image_size: int | None = None,
    overwrite: bool = False,
    again: bool = False,
    display: ProgressDisplay,
) -> ExtraStore:
    """Write the images of `sources`, one after the other, into a store in the folder `out`, and open it.

    A few chunks of them are in memory at a time. The store is written beside `out` and takes its name as a
    whole: a process that is killed leaves no store, and of processes that pack the same the others wait. A
    store of the same sources in `out` is left as it is, but for `again`.

    Args:
        image_size: to which the sources were opened.
        overwrite: replace a store of other sources.
        again: pack even if `out` is a store of the same sources.

    Raises: UserError where `out` is something else, there is no room, or a source is damaged.
    """
    out = out.absolute()
    with _alone(out):
        if not again and is_store(out) and _packs(store := ExtraStore(out), sources):
            return store
        if is_store(out) and not overwrite:
            raise UserError(f"{out} is a store of other images; choose another --out, or --overwrite")
        if os.path.lexists(out) and not is_store(out) and not (out.is_dir() and not any(out.iterdir())):
            raise UserError(f"{out} is not a store of extra images; choose another --out")
        _check_room(sources, out)
        folder = _new_folder(out)
        try:
            _write(sources, folder, image_size, display)
            ExtraStore(folder)
            _take_place(folder, out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return ExtraStore(out)


def _unfinished(out: Path) -> str:
    """The beginning of names beside `out` that are no stores."""
    return f".{out.name}.part-"


def _new_folder(out: Path) -> Path:
    folder = out.with_name(f"{_unfinished(out)}{os.urandom(6).hex()}")
    folder.mkdir()
    return folder


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Wait while another process packs into `out`; then remove what killed ones have left."""
    path, waited = out.with_name(f".{out.name}.lock"), False
    while True:
        with path.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if waited else fcntl.LOCK_NB))
            except BlockingIOError:
                logger.info("another process is packing into %s: waiting for it", out)
                waited = True
                continue
            except OSError:  # a file system without locks: each packs for itself, and the first one stays
                yield
                return
            if not path.exists() or not os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                continue  # the one that held it removed it
            try:
                for left in out.parent.glob(f"{glob.escape(_unfinished(out))}*"):
                    shutil.rmtree(left, ignore_errors=True)
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _packs(store: ExtraStore, sources: Sequence[PackSource]) -> bool:
    """True if `store` was packed from `sources` as they are now: images, their shape and class names."""
    held, first = store.facts.sources, sources[0]
    if (len(held), store.facts.shape, store.facts.class_names) != (
        len(sources),
        first.shape,
        first.class_names,
    ):
        return False
    return all(_unchanged(kept, source) for kept, source in zip(held, sources, strict=True))


def _unchanged(kept: SourceFile, source: PackSource) -> bool:
    same = source.same_as(kept)
    return source.about().sha256 == kept.sha256 if same is None else same


def _check_room(sources: Sequence[PackSource], out: Path) -> None:
    needed = sum(source.count * (prod(source.shape) + LABEL_BYTES) for source in sources)
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise UserError(
            f"{out} takes {needed / GIB:,.1f} GiB, but {free / GIB:,.1f} GiB are free there; choose another "
            "place by fastdynat pack --out"
        )


def _write(
    sources: Sequence[PackSource], folder: Path, image_size: int | None, display: ProgressDisplay
) -> None:
    count, shape = sum(source.count for source in sources), sources[0].shape
    labelled, chunk = sources[0].labelled, max(1, CHUNK_BYTES // prod(sources[0].shape))
    sums, largest = [], 0
    title = f"packing {sources[0].path.name}"
    with (
        (folder / IMAGES).open("wb") as images,
        (folder / LABELS).open("wb") as labels,
        display.task(title, count, unit="images") as progress,
    ):
        _begin(images, np.dtype(np.uint8), (count, *shape))
        _begin(labels, np.dtype("<i4"), (count,))
        for pixels, found in _chunks(sources, chunk):
            images.write(pixels.data)
            sums.append(zlib.crc32(pixels.data))
            if found is not None:
                labels.write(found.astype("<i4").data)
                largest = max(largest, int(found.max()))
            progress.advance(len(pixels))
        for file in (images, labels):
            file.flush()
            os.fsync(file.fileno())
    if not labelled:
        (folder / LABELS).unlink()
    np.save(folder / CHECKSUMS, np.array(sums, dtype=np.uint32))
    mapped = np.load(folder / LABELS, mmap_mode="r") if labelled else None
    facts = StoreFacts(
        format=FORMAT,
        count=count,
        shape=shape,
        classes=largest + 1 if labelled else None,
        class_names=sources[0].class_names,
        image_size=image_size if sources[0].path.is_dir() else None,
        chunk=chunk,
        checksum=total_checksum((count, *shape), np.array(sums, dtype=np.uint32), mapped),
        sources=tuple(source.about() for source in sources),
    )
    with (folder / STORE).open("w", encoding="utf-8") as text:  # last: without it the folder is no store
        json.dump(asdict(facts), text, indent=1)
        text.flush()
        os.fsync(text.fileno())


def _begin(file: IO[bytes], dtype: np.dtype, shape: tuple[int, ...]) -> None:
    about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, about)


def _chunks(sources: Sequence[PackSource], size: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Images of all sources in chunks of `size`, the last one smaller, contiguous."""
    held: list[np.ndarray] = []
    held_labels: list[np.ndarray] = []
    number = 0
    for source in sources:
        for pixels, labels in source.chunks(size):
            held.append(pixels)
            held_labels += [] if labels is None else [labels]
            number += len(pixels)
            if number >= size:
                whole = np.concatenate(held)
                numbers = np.concatenate(held_labels) if held_labels else None
                yield whole[:size], None if numbers is None else numbers[:size]
                held, number = [whole[size:].copy()], number - size
                held_labels = [] if numbers is None else [numbers[size:]]
    if number:
        yield np.concatenate(held), np.concatenate(held_labels) if held_labels else None


def _take_place(folder: Path, out: Path) -> None:
    """Rename the finished store in `folder` to `out`, in the place of an older one."""
    old = None
    if is_store(out):
        old = _new_folder(out)
        with suppress(OSError):
            out.rename(old)
    try:
        folder.rename(out)
    except OSError:
        if not is_store(out):  # without locks another process may have been first
            raise
    finally:
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    descriptor = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
