"""Dealing out a batch: the positions of a global batch that each rank, and each of its micro-batches, takes.

Position p belongs to rank p mod W of W. A smaller batch at the end of an epoch is dealt out in the same way,
so a state that belongs to a position stays with its rank. Micro-batches are consecutive pieces of the global
batch, the same at any W, each dealt out to all ranks. A batch too small to give every piece of every rank two
images is not dealt out: every rank takes all of it and counts it as one W-th.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

LEAST = 2  # images of a share: batch norm cannot train on one value per channel


@dataclass(frozen=True)
class Share:
    """This process's part of a global batch, or of a piece of it.

    Attributes:
        total: images in the global batch.
        rank, ranks: of the piece, every `ranks`-th position from the first that is `rank` mod `ranks` on.
        copies: processes that have these same images; 1 unless the batch is replicated.
        begin, end: positions of the piece; an `end` of None is the batch's.
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
        """Images of this share."""
        return len(self.positions)

    @property
    def images_of_all_ranks(self) -> int:
        """Images of the piece, over all ranks."""
        return (self.total if self.end is None else self.end) - self.begin

    @property
    def weight(self) -> float:
        """The weight of a mean over this share in the mean over the global batch."""
        return self.images / (self.total * self.copies)

    @property
    def replicated(self) -> bool:
        return self.copies > 1

    def below(self, position: int) -> int:
        """The number of this share's images, its first ones, whose position is below `position`."""
        own = self.positions
        return len(range(own.start, min(position, own.stop), own.step))

    def pieces(self, count: int) -> list["Share"]:
        """This share of each of `count` pieces of the batch; of the whole where those would be too small.

        Whether they are does not depend on the number of ranks: a batch that is too small for them is
        replicated, and cut on every rank as on one.
        """
        if count == 1 or self.total < LEAST * self.ranks * count:
            return [self]
        ends = [self.total * number // count for number in range(count + 1)]
        return [replace(self, begin=begin, end=end) for begin, end in pairwise(ends)]


def deal(total: int, rank: int, ranks: int, pieces: int = 1) -> Share:
    """The share of `rank` in a batch of `total` images, of which micro-batches are `pieces`."""
    if ranks > 1 and total < LEAST * ranks * pieces:
        return Share(total, copies=ranks)
    return Share(total, rank, ranks)
