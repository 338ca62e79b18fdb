"""What every launcher needs."""

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the device of `tensor` current: Triton launches there, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
