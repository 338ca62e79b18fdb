"""Input gradient of a network's first convolution on the CPU, by one matrix product.

oneDNN's input gradient of a convolution with the few channels of an image takes three to seven times as long
as its forward pass: it computes full vectors of channels and keeps three. The product of the transposed
filters with the gradient, added up at the pixels (`torch.nn.functional.fold`), does the arithmetic that is
needed.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST_CHANNELS = 4
FEWEST_FILTERS = 24  # with fewer, adding up at the pixels takes longer than oneDNN
MOST_NUMBERS = 1 << 21  # of one product: 8 MiB


class _FirstConvolution(torch.autograd.Function):
    """A convolution of images; differentiable in the images alone, to any order."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]) -> Tensor:
        return F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.geometry = inputs
        ctx.size = x.shape[2:]
        ctx.save_for_backward(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        stride, padding, dilation = ctx.geometry
        filters = weight.flatten(1).T
        size = max(MOST_NUMBERS // max(len(filters) * grad[0, 0].numel(), 1), 1)
        found = [
            F.fold(filters @ some.flatten(2), ctx.size, weight.shape[2:], dilation, padding, stride)
            for some in grad.split(size)
        ]
        return found[0] if len(found) == 1 else torch.cat(found), None, None, None


class ImageConv2d(nn.Conv2d):
    """A convolution of images whose weight needs no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        """``nn.Conv2d.forward``; its input gradient by a matrix product where that is faster."""
        suits = x.dim() == 4 and x.device.type == "cpu" and x.requires_grad and x.numel() > 0
        if not suits or torch.is_autocast_enabled("cpu") or self.weight.requires_grad:
            return super().forward(x)
        geometry = (self.stride, self.padding, self.dilation)
        found: Tensor = _FirstConvolution.apply(x, self.weight, self.bias, geometry)
        return found


def fast_image_gradients(network: nn.Module) -> int:
    """Make the convolutions of images in `network` an `ImageConv2d`, in place; returns their number.

    For a network on the CPU in float32, whose calls are not compiled.
    """
    found = [module for module in network.modules() if _suits(module)]
    for module in found:
        module.__class__ = ImageConv2d
    return len(found)


def _suits(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv2d
        and module.in_channels <= MOST_CHANNELS
        and module.groups == 1
        and module.out_channels >= FEWEST_FILTERS
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and module.weight.dtype == torch.float32
        and module.weight.device.type == "cpu"
        and not module.weight.requires_grad
        and not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
    )
