"""The gradients of a batch norm over the global batch, differentiable once more."""

from typing import Any

import torch
from torch import Tensor

from fastdynat.distributed.collectives import sum_over_ranks


class _Sum(torch.autograd.Function):
    """The sum over the ranks; each rank's loss has a gradient in it, and all of these are summed."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        return sum_over_ranks(local)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total: Tensor = _Sum.apply(grad.contiguous())
        return total


def differentiable_gradients(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias where that of the output (N, C, ...) is `dy`, with their graph.

    Each rank has a shard of the batch and gets its part of the gradients of weight and bias.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    dims = [dim for dim in range(x.dim()) if dim != 1]
    shape = (1, -1, *(1,) * (x.dim() - 2))
    values, slopes = x.to(wide), dy.to(wide)
    local = values.new_full((1,), x.numel() // x.shape[1])
    count = sum_over_ranks(local)

    def mean(of: Tensor) -> Tensor:
        total: Tensor = _Sum.apply(of.sum(dims))
        return total.div(count).view(shape)

    centred = values - mean(values)
    inverse = torch.rsqrt(mean(centred.square()) + eps)
    normalized = centred * inverse
    scale = inverse if weight is None else inverse * weight.to(wide).view(shape)
    dx = scale * (slopes - mean(slopes) - normalized * mean(slopes * normalized))
    d_weight = None if weight is None else (slopes * normalized).sum(dims).to(weight.dtype)
    d_bias = None if bias is None else slopes.sum(dims).to(bias.dtype)
    return dx.to(x.dtype), d_weight, d_bias
