"""Batches of images and labels, the interface of training loaders, and batches of an evaluation."""

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastdynat.data.extra_sampler import ExtraSampler
from fastdynat.data.image_sets import Images
from fastdynat.data.read_ahead import read_in_order
from fastdynat.distributed.shares import Share
from fastdynat.errors import UserError
from fastdynat.ops.augment import to_unit


@dataclass
class Batch:
    """Images of one step that this process takes.

    Attributes:
        x: float32 (N, C, H, W) in [0, 1].
        labels: int64 (N,).
        indices: int64 (N,), the images' numbers in the set. All on one device.
        share: what part of the step's global batch these are; by default all of it.
        mixed: float32 (N, K), the labels of mixed images (mixup, CutMix) as probabilities of the classes, of
            which `labels` are the likeliest; None where no image is mixed.
    """

    x: Tensor
    labels: Tensor
    indices: Tensor
    share: Share = None  # type: ignore[assignment]
    mixed: Tensor | None = None

    def __post_init__(self) -> None:
        if self.share is None:
            self.share = Share(len(self.labels))

    @property
    def targets(self) -> Tensor:
        """The labels of losses and attacks: (N, K) probabilities if mixed, else (N,) classes."""
        return self.labels if self.mixed is None else self.mixed

    def rows(self, rows: slice, share: Share) -> "Batch":
        """The part of this batch at `rows`."""
        mixed = None if self.mixed is None else self.mixed[rows]
        return Batch(self.x[rows], self.labels[rows], self.indices[rows], share, mixed)


class TrainLoader(Protocol):
    """Interface of a training loader."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches that `epoch` yields from step 0."""

    @property
    def num_images(self) -> int:
        """Number of images in the set, without extra ones."""

    @property
    def epoch_images(self) -> int:
        """Number of images in the batches of an epoch, extra and repeated ones included."""

    @property
    def extra_sampler(self) -> ExtraSampler | None:
        """The sampler of extra images; None where there are none."""

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from `start_step` on; a restart yields the same ones."""

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers and tensors that identify the data and the order of the current epoch."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that this loader continues where `state` was taken; raises UserError where it would not."""


def eval_batches(
    images: Images,
    *,
    batch_size: int,
    device: torch.device | str,
    limit: int | None = None,
    channels_last: bool = False,
) -> Generator[Batch]:
    """Yield the first `limit` images (all if None) in order, unaugmented; the last batch may be smaller.

    Images in files are read ahead by threads, a few batches at most (`read_in_order`).

    Raises: UserError for a batch size or limit below 1; while reading also for a file that cannot be decoded.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise UserError(f"batch size and limit must be at least 1, got {batch_size} and {limit}")
    count = len(images) if limit is None else min(limit, len(images))

    def batches() -> Generator[Batch]:
        stop = 0
        with closing(read_in_order(images, batch_size, count)) as read:
            for pixels in read:
                start, stop = stop, stop + len(pixels)
                labels = images.labels[start:stop].to(device, non_blocking=True)
                x = to_unit(pixels.to(device, non_blocking=True), channels_last=channels_last)
                yield Batch(x, labels, torch.arange(start, stop, device=device))

    return batches()
