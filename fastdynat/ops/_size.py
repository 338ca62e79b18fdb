"""Sizes of operators: numbers, or scalars on the device that a captured graph reads anew at each replay."""

import torch
from torch import Tensor

Size = float | Tensor


def split_size(op: str, name: str, size: Size, like: Tensor) -> tuple[float, Tensor | None]:
    """The two arguments that an operator takes for `size`: a number, and a tensor that replaces it.

    Raises ValueError for a tensor that is no float scalar on the device of `like`.
    """
    if not isinstance(size, Tensor):
        return float(size), None
    if size.dim() != 0 or size.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{op}: {name} must be a number or a scalar of float32 or float64, "
            f"got {size.dtype} {tuple(size.shape)}"
        )
    if size.device != like.device:
        raise ValueError(f"{op}: {name} is on {size.device} but the images are on {like.device}")
    return 0.0, size.detach().double()


def size_in(dtype: torch.dtype, number: float, tensor: Tensor | None) -> Size:
    """A size as eager arithmetic on images of `dtype` takes it: a tensor rounded as a number would be."""
    return number if tensor is None else tensor.to(dtype)
