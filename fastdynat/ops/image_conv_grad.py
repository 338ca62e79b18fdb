"""Input gradient of a convolution of the few channels of an image, through its ReLU, on the CPU.

A product with the filters, whose windows are added up at the pixels. oneDNN computes whole vectors of
channels and keeps the three of an image, which takes three to seven times as long as its forward pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdynat.ops._register import register_operator
from fastdynat.ops._select import select

NAME = "image_conv_grad"
Geometry = tuple[int, int, int, int]  # strides down and across, paddings down and across


def _eager(
    grad: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    height: int,
    width: int,
    stride_down: int,
    stride_across: int,
    pad_down: int,
    pad_across: int,
) -> Tensor:
    """The reference."""
    grad = grad if gate is None else torch.where(gate <= 0, 0.0, grad)
    windows = weight.flatten(1).T @ grad.flatten(2)
    strides, pads = (stride_down, stride_across), (pad_down, pad_across)
    found = F.fold(windows, (height, width), weight.shape[2:], padding=pads, stride=strides)
    last = found.new_empty(
        len(found), height, width, found.shape[1]
    )  # contiguous() keeps strides of no images
    return last.copy_(found.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _fake(grad: Tensor, weight: Tensor, height: int, width: int, **_: Any) -> Tensor:
    return grad.new_empty(len(grad), height, width, weight.shape[1]).permute(0, 3, 1, 2)


# For the CPU only: on a GPU the first layer takes no time.
IMPLEMENTATIONS = register_operator(NAME, eager=_eager, fake=_fake, gpu=False)


class _Conv(torch.autograd.Function):
    """The convolution with a separate setup_context, which torch.func needs."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, relu: bool, backend: str
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y = F.conv2d(x, weight, bias, geometry[:2], geometry[2:])
        return y.relu_() if relu else y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.geometry, relu, ctx.backend = inputs
        ctx.size = tuple(x.shape[2:])
        ctx.save_for_backward(weight, output if relu else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, gate = ctx.saved_tensors
        if gate is not None and torch.is_grad_enabled():  # to be differentiated again
            grad, gate = torch.ops.aten.threshold_backward(grad, gate, 0), None
        found = _Grad.apply(grad, weight, gate, ctx.size, ctx.geometry, ctx.backend)
        return found, *(None,) * 5


class _Grad(torch.autograd.Function):
    """The gradient, linear in `grad` where there is no gate, and then differentiable."""

    @staticmethod
    def forward(
        grad: Tensor,
        weight: Tensor,
        gate: Tensor | None,
        size: tuple[int, int],
        geometry: Geometry,
        backend: str,
    ) -> Tensor:
        with torch.autocast(grad.device.type, enabled=False):
            return select(NAME, IMPLEMENTATIONS, backend, grad)(grad, weight, gate, *size, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, weight, _, _, ctx.geometry, _ = inputs
        ctx.save_for_backward(weight)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        with torch.autocast(cotangent.device.type, enabled=False):
            found = F.conv2d(cotangent, weight, None, ctx.geometry[:2], ctx.geometry[2:])
        return found, *(None,) * 5


def image_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    relu: bool = False,
    backend: str = "auto",
) -> Tensor:
    """``conv2d(x, weight, bias, stride, padding)``, then with `relu` its ReLU, with a fast input gradient.

    Fast for few channels. Differentiable in `x` alone, to any order, by autograd and torch.func.grad.
    Autocast is not applied.

    Args:
        x: (N, C, H, W), float32, any layout. Its gradient is channels-last.
        weight: (K, C, R, S), float32; no gradient.
        bias: (K,) or None; no gradient.
        stride, padding: pairs (down, across).
        relu: take the ReLU; its mask is then applied where the gradient is read.
        backend: of the gradient: "auto", "cpp" (CPU tensors) or "eager". Other devices run "eager".

    Returns:
        (N, K, H', W'), float32, in the layout of conv2d's result.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a gradient is wanted of the weight or the bias.
        RuntimeError: the backend asked for cannot run here.
    """
    if x.dim() != 4 or weight.dim() != 4 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"image_conv: x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}, expected "
            "(N, C, H, W) and (K, C, R, S)"
        )
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != torch.float32:
            raise ValueError(f"image_conv: {name} must be float32, got {tensor.dtype}; use conv2d for others")
        if tensor.device != x.device:
            raise ValueError(f"image_conv: {name} is on {tensor.device}, expected {x.device}")
        if tensor is not x and tensor.requires_grad:
            raise ValueError(
                f"image_conv: no gradient of {name} is computed; use {name}.detach(), or conv2d to train it"
            )
    (down, across), (pad_down, pad_across) = stride, padding
    select(NAME, IMPLEMENTATIONS, backend, x)  # refused here, not in the backward pass
    return _Conv.apply(x, weight, bias, (down, across, pad_down, pad_across), relu, backend)
