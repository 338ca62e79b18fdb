"""The split of a global batch over the ranks and over micro-batches.

With world size W, position p belongs to rank p mod W. A smaller batch at the end of an epoch is split in the
same way, so state that belongs to a position stays on its rank. Micro-batches are consecutive pieces of the
global batch, the same at any W; each is split over all ranks. A batch too small to give every rank two images
of every piece is not split: every rank computes all of it with weight 1 / W.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

LEAST = 2  # images of a share, because batch norm cannot train on one value per channel


@dataclass(frozen=True)
class Share:
    """This process's part of a global batch, or of a piece of it.

    Attributes:
        total: images in the global batch.
        rank, ranks: the share holds the positions p of the piece with p mod `ranks` = `rank`.
        copies: number of processes that have these images; 1 unless the batch is replicated.
        begin, end: the piece's first position, and the one after its last; None is the end of the batch.
    """

    total: int
    rank: int = 0
    ranks: int = 1
    copies: int = 1
    begin: int = 0
    end: int | None = None

    @property
    def positions(self) -> range:
        """This share's positions in the global batch."""
        first = self.begin + (self.rank - self.begin) % self.ranks
        return range(first, self.total if self.end is None else self.end, self.ranks)

    @property
    def images(self) -> int:
        """Number of images in this share."""
        return len(self.positions)

    @property
    def images_of_all_ranks(self) -> int:
        """Number of images in the piece, over all ranks."""
        return (self.total if self.end is None else self.end) - self.begin

    @property
    def weight(self) -> float:
        """The weight of a mean over this share in the mean over the global batch."""
        return self.images / (self.total * self.copies)

    @property
    def replicated(self) -> bool:
        return self.copies > 1

    def below(self, position: int) -> int:
        """Number of images in this share at positions below `position`."""
        own = self.positions
        return len(range(own.start, min(position, own.stop), own.step))

    def pieces(self, count: int) -> list["Share"]:
        """This rank's shares of `count` pieces of the batch; the whole share if these would be too small.

        A batch with too few images for `ranks` times `count` shares is replicated by `deal`, and then cut on
        every rank as with one process.
        """
        if count == 1 or self.total < LEAST * self.ranks * count:
            return [self]
        ends = [self.total * number // count for number in range(count + 1)]
        return [replace(self, begin=begin, end=end) for begin, end in pairwise(ends)]


def deal(total: int, rank: int, ranks: int, pieces: int = 1) -> Share:
    """The share of `rank` in a batch of `total` images that is cut into `pieces` micro-batches."""
    if ranks > 1 and total < LEAST * ranks * pieces:
        return Share(total, copies=ranks)
    return Share(total, rank, ranks)
