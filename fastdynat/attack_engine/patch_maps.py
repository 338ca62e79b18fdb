"""Maps of known images, with the patches of them that a pass changes."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastdynat.attack_engine.patch_geometry import Patch, Reading


@dataclass(frozen=True)
class Squares:
    """The changed squares of one pass.

    Attributes:
        images: (m,) int64, rows of the known images.
        top, left: (m,) int64, their first row and column.
    """

    images: Tensor
    top: Tensor
    left: Tensor

    def take(self, rows: Tensor) -> "Squares":
        return Squares(self.images[rows], self.top[rows], self.left[rows])


@dataclass(frozen=True)
class MapCrop:
    """A part of a map that a later node reads: rows times columns, as positions in the node's `KnownMap`."""

    rows: Reading
    columns: Reading


@dataclass
class KnownMap:
    """A node's map of every known image, with a border of zeros, and behind them the pass's fresh patches.

    Attributes:
        patch: its geometry.
        border: rows and columns of zeros on each side.
        data: (images * positions + fresh positions, channels).
        images: number of known images.
        contiguous: the network's own map is, which later views may need.
    """

    patch: Patch
    border: tuple[int, int]
    data: Tensor
    images: int
    contiguous: bool = True

    @property
    def width(self) -> int:
        return self.patch.columns.total + 2 * self.border[1]

    @property
    def positions(self) -> int:
        return (self.patch.rows.total + 2 * self.border[0]) * self.width

    @property
    def inner(self) -> Tensor:
        """(images, rows, columns, channels), without the border."""
        shape = (self.images, -1, self.width, self.patch.channels)
        known = self.data[: self.images * self.positions].view(shape)
        (down, across), rows, columns = self.border, self.patch.rows.total, self.patch.columns.total
        return known[:, down : down + rows, across : across + columns]

    def crop(self, crop: MapCrop, squares: Squares) -> Tensor:
        """(m, channels, rows, columns) in channels-last order: fresh where it changed, known elsewhere."""
        rows, columns = crop.rows, crop.columns
        kept, fresh = (
            (first[:, None, None] + down[squares.top][:, :, None] + across[squares.left][:, None, :])
            for first, down, across in (
                (squares.images * self.positions, rows.kept, columns.kept),
                (self._fresh(len(squares.images)), rows.fresh, columns.fresh),
            )
        )
        changed = rows.changed[squares.top][:, :, None] & columns.changed[squares.left][:, None, :]
        at = torch.where(changed, fresh, kept)
        return self.data.index_select(0, at.flatten()).view(*at.shape, -1).permute(0, 3, 1, 2)

    def write(self, value: Tensor) -> None:
        """Store the fresh patches `value` (m, channels, rows, columns)."""
        start, size = self.images * self.positions, len(value) * self.patch.size
        self.data[start : start + size].view(len(value), *value.shape[2:], -1).copy_(
            value.permute(0, 2, 3, 1)
        )

    def accept(self, chosen: Tensor, squares: Squares) -> None:
        """Make the fresh patches `chosen` of `squares` part of the known maps."""
        (down, across), patch = self.border, self.patch
        rows = patch.rows.first[squares.top[chosen], None] + torch.arange(patch.rows.count) + down
        columns = patch.columns.first[squares.left[chosen], None] + torch.arange(patch.columns.count) + across
        first = (squares.images[chosen] * self.positions)[:, None, None]
        at = first + rows[:, :, None] * self.width + columns[:, None, :]
        fresh = self._fresh(len(squares.images))[chosen, None] + torch.arange(patch.size)
        self.data.index_copy_(0, at.flatten(), self.data.index_select(0, fresh.flatten()))

    def keep(self, rows: Tensor, most: int) -> "KnownMap":
        """Of the known images `rows` (n,) alone, with room for `most` fresh patches."""
        known = self.data[: self.images * self.positions].view(self.images, -1)[rows]
        return replace(self, data=with_room(known, self.patch, most), images=len(rows))

    def _fresh(self, count: int) -> Tensor:
        return self.images * self.positions + torch.arange(count) * self.patch.size


def with_room(known: Tensor, patch: Patch, most: int) -> Tensor:
    """`known` positions with room for `most` fresh patches behind them."""
    known = known.reshape(-1, patch.channels)
    return torch.cat([known, known.new_empty(most * patch.size, patch.channels)])
