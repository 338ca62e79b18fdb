"""Reading of images in order and in batches: those in files by threads, a few batches ahead."""

import hashlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod

import torch
from torch import Tensor

from fastdynat.data.image_sets import Images, ImageSet
from fastdynat.errors import UserError
from fastdynat.machine.cores import own_cores
from fastdynat.machine.free_memory import own_memory

BATCHES_AHEAD = 2  # read while one is in use; with the one being put together, four batches are in memory
MAX_THREADS = 16
DIGEST_BATCH = 256  # images read at a time where all of them pass by
PIECE = 16  # images of one task: many enough to hide the pool's overhead, few enough to spread


def pool() -> ThreadPoolExecutor:
    """Threads for work that waits for the disk or for decoders, which do not hold the interpreter lock."""
    return ThreadPoolExecutor(max_workers=min(MAX_THREADS, own_cores()))


def read_in_order(images: Images, batch_size: int, count: int) -> Generator[Tensor]:
    """Yield the first `count` images as uint8 batches (n, C, H, W) on the CPU.

    Images in memory are not copied. Of images in files at most `BATCHES_AHEAD` batches are read ahead.

    Raises: UserError naming the first image that cannot be read.
    """
    if isinstance(images, ImageSet):
        for start in range(0, count, batch_size):
            yield images.images[start : min(start + batch_size, count)]
        return
    if count:
        yield from _read_ahead(images, torch.arange(count).split(batch_size))


def _read_ahead(images: Images, batches: Iterable[Tensor]) -> Generator[Tensor]:
    threads = pool()
    waiting: deque[list[Future[Tensor]]] = deque()
    try:
        for batch in batches:
            waiting.append([threads.submit(images.read, piece) for piece in batch.split(PIECE)])
            if len(waiting) > BATCHES_AHEAD:
                yield _together(waiting.popleft())
        while waiting:
            yield _together(waiting.popleft())
    finally:  # also where the caller wants no more
        threads.shutdown(wait=True, cancel_futures=True)


def _together(pieces: list[Future[Tensor]]) -> Tensor:
    # In order, so that the first error raised is that of the first bad image.
    return torch.cat([piece.result() for piece in pieces])


def read_whole(images: Images) -> Tensor:
    """All images, uint8 (N, C, H, W), read by threads.

    Raises: UserError as `check_fits`, or naming the first image that cannot be read.
    """
    check_fits(len(images), images.shape)
    found = torch.empty((len(images), *images.shape), dtype=torch.uint8)
    start = 0
    for part in read_in_order(images, DIGEST_BATCH, len(images)):
        found[start : start + len(part)] = part
        start += len(part)
    return found


def check_fits(count: int, shape: tuple[int, int, int]) -> None:
    """Raise UserError where `count` images of `shape` take more than half of this process's free memory."""
    needed, available = count * prod(shape), own_memory()
    if available is not None and needed > available / 2:
        raise UserError(
            f"{count} images of {shape[1]}x{shape[2]} take {needed / 2**30:.2f} GiB, more than half of "
            f"the {available / 2**30:.2f} GiB of memory available; pass a smaller --image-size, or for "
            "training images a --train-size, or --loader dali or torch, which keep none in memory"
        )


def pixel_digest(images: Images) -> str:
    """The sha256 of all pixels and labels; the same for images in memory and in files."""
    digest = hashlib.sha256()
    for part in _parts(images):
        digest.update(part.contiguous().numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


def set_digest(images: Images) -> str:
    """The sha256 of all pixels and labels in any order: equal for two orders of the same images."""
    labels = images.labels.tolist()
    found: list[bytes] = []
    for part in read_in_order(images, DIGEST_BATCH, len(images)):
        for image in part.contiguous().numpy():
            about = f"{image.shape} {labels[len(found)]} ".encode()
            found.append(hashlib.sha256(about + image.tobytes()).digest())
    return hashlib.sha256(b"".join(sorted(found))).hexdigest()


def _parts(images: Images) -> Iterator[Tensor]:
    yield from read_in_order(images, DIGEST_BATCH, len(images))
    yield images.labels
