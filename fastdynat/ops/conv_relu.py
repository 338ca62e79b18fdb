"""ReLU(convolution + bias + residual) as one cuDNN kernel on a GPU, for networks with constant weights.

Eager PyTorch passes over the result up to four times (convolution, bias, residual, ReLU). A compiler does so
twice, as it leaves the convolution to a library.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdynat import verification

NAME = "fastdynat_cudnn::conv_relu"  # not in csrc's namespace: the kernel comes with torch
Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], int]  # stride, padding, dilation, groups


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The definition, in plain torch."""
    out = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return (out if residual is None else out + residual).relu_()


def cudnn(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *geometry: Any) -> Tensor:
    """The operator by cuDNN, which sums in float32 and rounds after the ReLU. CUDA tensors, no gradient.

    With deterministic algorithms the definition, as torch asks cuDNN for them in plain convolutions only.
    """
    if torch.are_deterministic_algorithms_enabled():
        return reference(x, weight, bias, residual, *geometry)
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)


# On other devices the definition runs, so that networks rewritten to use the operator can be tested there.
torch.library.define(
    NAME, torch.library.infer_schema(reference, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,)
)
torch.library.impl(NAME, "default", reference)
torch.library.impl(NAME, "cuda", cudnn)
torch.library.register_fake(NAME, reference)


def conv_relu_check_name(dtype: torch.dtype) -> str:
    """The name of the operator's check for `dtype`."""
    return f"conv_relu_{str(dtype).removeprefix('torch.')}"


def runs_right(dtype: torch.dtype, device: torch.device) -> bool:
    """True if the operator may be used on `device` for `dtype`.

    On a GPU that is whether cuDNN's kernel is correct, which the first call verifies; do not call it while a
    graph is captured or a network compiled. Other devices run the definition: True.
    """
    if device.type != "cuda":
        return True
    importlib.import_module("fastdynat.ops.checks")  # registers the checks, which import this file
    name = conv_relu_check_name(dtype)
    return name in verification.registered() and "cudnn" in verification.right(name, device)


class _ConvReLU(torch.autograd.Function):
    """The operator with a separate setup_context, which torch.func needs."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, geometry: Geometry
    ) -> Tensor:
        return torch.ops.fastdynat_cudnn.conv_relu(x, weight, bias, residual, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, residual, ctx.geometry = inputs
        ctx.has_residual = residual is not None
        ctx.save_for_backward(x, weight, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, output = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        # The gradient of ReLU, which is the residual's gradient, too.
        passed = torch.ops.aten.threshold_backward(grad, output, 0)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x, _, _ = torch.ops.aten.convolution_backward(
                passed,
                x,
                weight,
                None,
                stride,
                padding,
                dilation,
                False,
                [0, 0],
                groups,
                [True, False, False],
            )
        return grad_x, None, None, passed if ctx.has_residual else None, None


def conv_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """``relu(conv2d(x, weight, bias, ...) + residual)``, differentiable in `x` and `residual`.

    Args:
        x: (N, C, H, W), in the dtype of `weight`; autocast is not applied.
        weight, bias: (K, C / groups, R, S) and (K,); neither gets a gradient.
        residual: of the result's shape and dtype, or None.

    Returns:
        (N, K, H', W'), channels-last where `x` or `weight` is.

    Raises:
        ValueError: the residual is of another shape or dtype than the result, or a gradient is wanted of
            weight or bias.
        RuntimeError: cuDNN has no such kernel for the dtype.
    """
    geometry = (list(stride), list(padding), list(dilation), groups)
    shape = result_shape(x, weight, geometry)
    if residual is not None and (residual.shape != shape or residual.dtype != weight.dtype):
        raise ValueError(
            f"conv_relu: residual is {residual.dtype} {tuple(residual.shape)}, expected {weight.dtype} "
            f"{tuple(shape)}; add it to conv2d's result where it is to be broadcast or converted"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"conv_relu computes no gradient for {name}: pass {name}.detach(), or use conv2d to train it"
            )
    return _ConvReLU.apply(x, weight, bias, residual, geometry)


def result_shape(x: Tensor, weight: Tensor, geometry: Geometry) -> torch.Size:
    """The shape of the convolution: (N, K, H', W')."""
    stride, padding, dilation, _ = geometry
    sides = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    ]
    return torch.Size((x.shape[0], weight.shape[0], *sides))
