"""Dealing out a batch: the positions of a global batch that each rank, and each of its micro-batches, takes.

Position p belongs to shard p mod S of S. A smaller batch at the end of an epoch is dealt out in the same way,
so a state that belongs to a position stays with its rank. A batch too small to give every shard two images is
not dealt out: every rank takes all of it and counts it as one W-th.
"""

from dataclasses import dataclass, replace

LEAST = 2  # images of a shard: batch norm cannot train on one value per channel


@dataclass(frozen=True)
class Share:
    """This process's part of a global batch.

    Attributes:
        first, stride: positions first, first + stride, first + 2 stride, ... of the batch.
        total: images in the global batch.
        copies: processes that have these same images; 1 unless the batch is replicated.
        ranks: processes that the batch is dealt out to.
    """

    first: int = 0
    stride: int = 1
    total: int = 0
    copies: int = 1
    ranks: int = 1

    @property
    def images(self) -> int:
        """Images of this share."""
        return len(range(self.first, self.total, self.stride))

    @property
    def weight(self) -> float:
        """The weight of a mean over this share in the mean over the global batch."""
        return self.images / (self.total * self.copies)

    @property
    def replicated(self) -> bool:
        return self.copies > 1

    def part(self, number: int, count: int) -> "Share":
        """Part `number` of the `count` parts of this share: every count-th of its images."""
        first = self.first + number * self.stride
        return replace(self, first=first, stride=self.stride * count)

    @property
    def images_of_all_ranks(self) -> int:
        """Images of this part of the batch, or of the whole batch, over all ranks."""
        begin = self.first // self.ranks * self.ranks
        firsts = range(begin, begin + self.ranks)
        return sum(len(range(first, self.total, self.stride)) for first in firsts)

    def below(self, position: int) -> int:
        """The number of this share's images, its first ones, whose position is below `position`."""
        return len(range(self.first, min(position, self.total), self.stride))


def deal(total: int, rank: int, ranks: int, parts: int = 1) -> Share:
    """The share of `rank` in a batch of `total` images, cut into `parts` micro-batches on each rank."""
    if ranks > 1 and total < LEAST * ranks * parts:
        return Share(0, 1, total, ranks)
    return Share(rank, ranks, total, ranks=ranks)
