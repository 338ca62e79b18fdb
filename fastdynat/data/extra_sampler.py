"""Batches of a dataset's own images and extra ones: the order of an epoch, and the images of both."""

import zlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastdynat.data.extra_store import ExtraSet
from fastdynat.data.image_sets import Images, ImageSet
from fastdynat.data.keyed_permutation import permuted
from fastdynat.data.split import seeded_generator
from fastdynat.errors import UserError

MOST_NUMBERS = 2**32 - 1  # draws of an image depend on the low 32 bits of its number
COPY_BATCH = 1024  # images read at a time into device memory


@dataclass(frozen=True)
class ExtraSampler:
    """The sampler of Gowal et al. 2021 and Wang et al. 2023, as a function of seed and epoch.

    Each step takes `own_per_step` of the N original images, which pass by in a new random order, and fills
    the batch with extra images, int(batch_size * share) of them. Where a pass over the originals ends, its
    last step has fewer of them and more extra images. The images of a step are shuffled among each other.
    Originals are numbered 0..N-1, extra images N..N+M-1.

    With `replacement` extra images are drawn uniformly and independently. Without, they follow permutations
    of all M, one after the other, that go on from epoch to epoch.

    Attributes:
        originals, extra: N and M.
        share: the extra images' share of a batch, in (0, 1).
        steps: steps of an epoch; None is ceil(N / batch_size).

    Raises: UserError for a share without an extra image, more originals in a step than there are, too many
        images, and without replacement for fewer extra images than a step takes.
    """

    originals: int
    extra: int
    batch_size: int
    share: float
    replacement: bool
    seed: int
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.extra_per_step < 1:
            raise UserError(
                f"extra_share {self.share:g} of a batch of {self.batch_size} is less than one image; use a "
                f"share of at least {1 / self.batch_size:.2g}, or leave --extra-data out"
            )
        if self.own_per_step > self.originals:
            raise UserError(
                f"batch size {self.batch_size} with extra_share {self.share:g} takes {self.own_per_step} of "
                f"the {self.originals} training images beside the extra ones; use a smaller batch"
            )
        if self.originals + self.extra > MOST_NUMBERS:
            raise UserError(
                f"{self.originals + self.extra:,} images are more than the {MOST_NUMBERS:,} that can be "
                "numbered; use fewer extra images"
            )
        if self.extra < self.extra_per_step:
            raise UserError(
                f"extra_share {self.share:g} takes {self.extra_per_step} extra images for a batch of "
                f"{self.batch_size}, but there are {self.extra}; use a smaller --extra-share, or more images"
            )

    @property
    def extra_per_step(self) -> int:
        """Extra images of a step, truncated as in the releases."""
        return int(self.batch_size * self.share)

    @property
    def own_per_step(self) -> int:
        """Original images of a step that does not end a pass over them."""
        return self.batch_size - self.extra_per_step

    @cached_property
    def num_steps(self) -> int:
        """Steps of an epoch."""
        return -(-self.originals // self.batch_size) if self.steps is None else self.steps

    def order(self, epoch: int) -> Tensor:
        """Numbers of the images of `epoch` by position: int64 (num_steps * batch_size,)."""
        numbers = torch.full((self.num_steps, self.batch_size), -1)
        numbers[:, : self.own_per_step] = self._own(epoch)
        missing = numbers < 0
        numbers[missing] = self.originals + self._extra(epoch, int(missing.sum()))
        generator = seeded_generator("order of extended batches", self.seed, epoch)
        inside = torch.rand(numbers.shape, dtype=torch.float64, generator=generator).argsort(dim=1)
        return numbers.gather(1, inside).flatten()

    def about(self) -> dict[str, int | float | bool]:
        """The numbers that decide the order, beside the seed."""
        return {
            "images": self.extra,
            "per_step": self.extra_per_step,
            "share": self.share,
            "replacement": self.replacement,
        }

    def __str__(self) -> str:
        """The sampler in words."""
        drawn = "with" if self.replacement else "without"
        return (
            f"{self.extra:,} extra images, {self.extra_per_step} in each batch of {self.batch_size}, drawn "
            f"{drawn} replacement"
        )

    def _own(self, epoch: int) -> Tensor:
        """Original images of each step, int64 (num_steps, own_per_step); -1 after the end of a pass."""
        pass_steps = -(-self.originals // self.own_per_step)
        generator = seeded_generator("originals of extended batches", self.seed, epoch)
        passes = []
        for _ in range(-(-self.num_steps // pass_steps)):
            padded = torch.full((pass_steps * self.own_per_step,), -1)
            padded[: self.originals] = torch.randperm(self.originals, generator=generator)
            passes.append(padded.view(pass_steps, self.own_per_step))
        return torch.cat(passes)[: self.num_steps]

    def _extra(self, epoch: int, count: int) -> Tensor:
        """The `count` extra images of `epoch`, which is the same in every epoch; int64 in [0, extra)."""
        if self.replacement:
            generator = seeded_generator("extra images", self.seed, epoch)
            return torch.randint(self.extra, (count,), generator=generator)
        first, last = epoch * count, (epoch + 1) * count
        parts = []
        while first < last:
            number, start = divmod(first, self.extra)
            stop = min(self.extra, start + last - first)
            parts.append(permuted(torch.arange(start, stop), self.extra, "extra pass", self.seed, number))
            first += stop - start
        return torch.cat(parts)


@dataclass(frozen=True)
class ExtendedImages:
    """The images of a run with extra data: `originals` 0..N-1, then `extra` N..N+M-1.

    share, replacement: see `ExtraSampler`.
    """

    originals: Images
    extra: ExtraSet
    share: float
    replacement: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return self.originals.shape

    def __len__(self) -> int:
        return len(self.originals) + len(self.extra)

    def read(self, indices: Tensor) -> Tensor:
        """Return the images at int64 `indices`, uint8 (n, C, H, W) on the CPU."""
        own = indices < len(self.originals)
        images = torch.empty((len(indices), *self.shape), dtype=torch.uint8)
        images[own] = self.originals.read(indices[own])
        images[~own] = self.extra.read(indices[~own] - len(self.originals))
        return images

    def labels_at(self, indices: Tensor) -> Tensor:
        """Labels of the images at int64 `indices`, int64 (n,) on the CPU."""
        own = indices < len(self.originals)
        labels = torch.empty(len(indices), dtype=torch.int64)
        labels[own] = self.originals.labels[indices[own]]
        labels[~own] = self.extra.labels_at(indices[~own] - len(self.originals))
        return labels

    def sampler(self, batch_size: int, seed: int, steps: int | None) -> ExtraSampler:
        """The order of batches of these images; see `ExtraSampler`."""
        own, extra = len(self.originals), len(self.extra)
        return ExtraSampler(own, extra, batch_size, self.share, self.replacement, seed, steps)

    def stored(self, device: torch.device) -> Tensor:
        """All images in the memory of `device`, uint8 (N + M, C, H, W)."""
        images = torch.empty((len(self), *self.shape), dtype=torch.uint8, device=device)
        assert isinstance(self.originals, ImageSet)
        images[: len(self.originals)] = self.originals.images
        start = len(self.originals)
        for piece in torch.arange(len(self.extra)).split(COPY_BATCH):
            images[start : start + len(piece)] = self.extra.read(piece)
            start += len(piece)
        return images

    def checksum(self) -> int:
        """Return a number that other data would not have."""
        return zlib.crc32(f"{self.originals.checksum()} {self.extra.checksum}".encode())

    def content(self) -> int:
        """That of the data set's own images: the checksum of the others covers their pixels."""
        return self.originals.content()
