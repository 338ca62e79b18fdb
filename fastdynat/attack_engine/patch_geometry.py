"""The reach of a change of a square of the image in the maps of a convolutional network.

A change of rows [a, a + h) of a map changes only some rows of the next one; columns likewise. Positions are
tables over the square's first row (or column) in the image, so that a pass looks them up.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Extent:
    """The changed rows (or columns) of a map.

    Attributes:
        first: (T,) int64, the first changed row, for each first row of the square in the image.
        count: number of changed rows, the same for all.
        total: number of rows of the map.
    """

    first: Tensor
    count: int
    total: int

    @classmethod
    def of_square(cls, side: int, total: int) -> "Extent":
        """Of an image with `total` rows."""
        return cls(torch.arange(total - side + 1), side, total)

    def through(self, kernel: int, stride: int, padding: int, total: int) -> "Extent":
        """Of the next map, with `total` rows, behind a convolution or pooling; `kernel` counts its gaps."""
        count = min((self.count + kernel - 2) // stride + 1, total)
        first = -((kernel - 1 - padding - self.first) // stride)  # the quotient rounded up
        return Extent(first.clamp(0, total - count), count, total)

    def covers(self, other: "Extent") -> bool:
        """Every change of `other` lies in this one, wherever the square is."""
        last, others = self.first + self.count, other.first + other.count
        return bool(((self.first <= other.first) & (last >= others)).all()) and self.total == other.total


@dataclass(frozen=True)
class Reading:
    """The rows (or columns) of a map that a pass reads, for each first row of the square; (T, n) each.

    Attributes:
        kept: the row in the map of the unchanged image, which has a border of zeros.
        fresh: the row among the changed ones, where `changed`.
        changed: bool.
    """

    kept: Tensor
    fresh: Tensor
    changed: Tensor

    @classmethod
    def of(cls, source: Extent, first: Tensor, count: int, border: int) -> "Reading":
        """`count` rows of `source` from `first` (T,) on."""
        rows = first[:, None] + torch.arange(count)
        fresh = rows - source.first[:, None]
        return cls(rows + border, fresh, (fresh >= 0) & (fresh < source.count))


@dataclass(frozen=True)
class Patch:
    """The changed part of a map of `channels` channels: rows and columns."""

    rows: Extent
    columns: Extent
    channels: int

    @property
    def share(self) -> float:
        """Of the map's positions."""
        return self.rows.count * self.columns.count / (self.rows.total * self.columns.total)

    @property
    def size(self) -> int:
        """Number of its positions."""
        return self.rows.count * self.columns.count

    def covers(self, other: "Patch") -> bool:
        """Every change of `other` lies in this one."""
        return self.rows.covers(other.rows) and self.columns.covers(other.columns)
