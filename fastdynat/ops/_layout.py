"""Memory order: what kernels that walk memory from end to end may assume."""

import torch
from torch import Tensor


def one_order(first: Tensor, *others: Tensor) -> list[Tensor]:
    """The tensors, dense and in one memory order: that of `first`. Copies nothing where they are so
    already.
    """
    tensors = (first, *others)
    formats = (
        (torch.contiguous_format, torch.channels_last) if first.dim() == 4 else (torch.contiguous_format,)
    )
    for memory_format in formats:
        if all(t.is_contiguous(memory_format=memory_format) for t in tensors):
            return list(tensors)
    # empty_like keeps the order of dimensions and closes gaps, so equal strides mean that the tensor is
    # dense.
    template = torch.empty_like(first)
    return [
        t if t.stride() == template.stride() else torch.empty_like(template, dtype=t.dtype).copy_(t)
        for t in tensors
    ]


def images_together(images: Tensor) -> Tensor:
    """`images` (N, ...) so that each image is one block of memory: contiguous and channels-last are, else a
    copy.
    """
    if images.is_contiguous() or (
        images.dim() == 4 and images.is_contiguous(memory_format=torch.channels_last)
    ):
        return images
    return images.contiguous()
