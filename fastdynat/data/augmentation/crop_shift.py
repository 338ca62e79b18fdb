"""CropShift of IDBH (Li and Spratling 2023, arXiv 2301.09879)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdynat.ops.image_draws import ImageDraws


@dataclass(frozen=True)
class CropShift:
    """Cut s rows and columns off, at random sides, and put what is left at a random place of a black image.

    s is uniform in [0, `most`); a random number of the s are columns, the others rows.
    """

    most: int = 11
    kind: str = "crop shift"

    def apply(self, images: Tensor, draws: ImageDraws) -> Tensor:
        u = draws.uniform(6, dtype=torch.float64)
        total = (u[:, 0] * self.most).long()
        columns = _up_to(total, u[:, 1])
        index = []
        for side, lost, first, place in zip(
            images.shape[2:], (total - columns, columns), u[:, 2:4].T, u[:, 4:].T, strict=True
        ):
            kept = (side - lost).clamp(min=0)
            at = torch.arange(side) - _up_to(lost, place)[:, None]
            source = (at + _up_to(lost, first)[:, None]).clamp(0, side - 1)
            index.append((source.to(images.device), ((at >= 0) & (at < kept[:, None])).to(images.device)))
        (rows, row_kept), (cols, col_kept) = index
        number = torch.arange(len(images), device=images.device)
        taken = images[number[:, None, None], :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)
        kept_pixels = (row_kept[:, :, None] & col_kept[:, None, :])[:, None]
        return taken.masked_fill(~kept_pixels, 0).contiguous()


def _up_to(most: Tensor, u: Tensor) -> Tensor:
    """int64 (n,), uniform in [0, most]."""
    return (u * (most + 1)).long()
