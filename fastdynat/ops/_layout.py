"""Memory order of the arguments of kernels that walk memory from end to end."""

import torch
from torch import Tensor


def one_order(first: Tensor, *others: Tensor) -> list[Tensor]:
    """Return the tensors dense and in the memory order of `first`, copying only those that are not."""
    tensors = (first, *others)
    formats = (
        (torch.contiguous_format, torch.channels_last) if first.dim() == 4 else (torch.contiguous_format,)
    )
    for memory_format in formats:
        if all(t.is_contiguous(memory_format=memory_format) for t in tensors):
            return list(tensors)
    # empty_like keeps the order of dimensions and closes gaps: equal strides mean that a tensor is dense.
    template = torch.empty_like(first)
    return [
        t if t.stride() == template.stride() else torch.empty_like(template, dtype=t.dtype).copy_(t)
        for t in tensors
    ]


def images_together(images: Tensor) -> Tensor:
    """Return `images` (N, ...) with each image as one block of memory.

    Contiguous and channels-last tensors are returned as they are, others as a contiguous copy.
    """
    if images.is_contiguous() or (
        images.dim() == 4 and images.is_contiguous(memory_format=torch.channels_last)
    ):
        return images
    return images.contiguous()
