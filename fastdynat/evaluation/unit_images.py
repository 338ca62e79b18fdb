"""Test images as floats, read when they are needed."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdynat.data import Images, eval_batches


@dataclass(frozen=True)
class UnitImages:
    """Images of a set as float32 (n, C, H, W) in [0, 1] on the CPU, read when rows of them are asked for."""

    images: Images
    dtype = torch.float32
    device = torch.device("cpu")

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self.images.shape)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.images.read(rows).float() / 255

    def parts(self, size: int) -> Iterator[Tensor]:
        """All images in order, `size` at a time."""
        return (batch.x for batch in eval_batches(self.images, batch_size=size, device=self.device))
