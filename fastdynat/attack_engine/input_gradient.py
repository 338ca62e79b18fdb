"""A network's first convolution on the CPU, with its ReLU: by an operator of its own.

oneDNN's input gradient of a convolution with the few channels of an image takes three to seven times as long
as its forward pass: it computes full vectors of channels and keeps three. `fastdynat.ops.image_conv` does the
arithmetic that is needed, for channels-last images, and takes the ReLU along. Elsewhere the gradient is the
product of the transposed filters with the result's, added up at the pixels (`torch.nn.functional.fold`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastdynat.attack_engine.fx_tracing import relus_after
from fastdynat.ops import image_conv, permits, usable
from fastdynat.ops.image_conv_grad import NAME

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
    """A convolution of images whose weight needs no gradient.

    Attributes:
        rectified: the ReLU that follows it in the network is taken here.
        has_operator: the compiled `fastdynat.ops.image_conv` may run here (`usable`), with wide vectors;
            without them oneDNN is faster.
    """

    rectified: bool = False
    has_operator: bool = False

    def forward(self, x: Tensor) -> Tensor:
        """``nn.Conv2d.forward``, and the ReLU; the input gradient by a product where that is faster."""
        suits = x.dim() == 4 and x.device.type == "cpu" and x.requires_grad and x.numel() > 0
        if not suits or torch.is_autocast_enabled("cpu") or self.weight.requires_grad:
            return self._rectified(super().forward(x))
        if self._suits_operator(x):
            geometry: Any = {"stride": self.stride, "padding": self.padding, "relu": self.rectified}
            return image_conv(x, self.weight, self.bias, **geometry, backend="cpp")
        geometry = (self.stride, self.padding, self.dilation)
        found: Tensor = _FirstConvolution.apply(x, self.weight, self.bias, geometry)
        return self._rectified(found)

    def _rectified(self, out: Tensor) -> Tensor:
        return out.relu_() if self.rectified else out

    def _suits_operator(self, x: Tensor) -> bool:
        """Channels-last, as its gradient is; it shares the images between the threads."""
        if not self.has_operator or not permits("cpp"):
            return False
        if x.dtype != torch.float32 or self.dilation != (1, 1):
            return False
        last = x.stride(1) == 1 and x.is_contiguous(memory_format=torch.channels_last)
        return last and len(x) >= torch.get_num_threads()


class Rectified(nn.Identity):
    """In place of a ReLU that the `ImageConv2d` before it takes."""


def fast_image_gradients(network: nn.Module) -> int:
    """Make the convolutions of images in `network` an `ImageConv2d`, in place; returns their number.

    For a network on the CPU in float32, whose calls are not compiled.
    """
    found = [module for module in network.modules() if _suits(module)]
    wide = bool(found) and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    has_operator = wide and usable(NAME, "cpp", torch.device("cpu"))
    for module in found:
        module.__class__ = ImageConv2d
        module.has_operator = has_operator  # type: ignore[assignment]
    return len(found)


def take_relus_along(traced: fx.GraphModule) -> None:
    """Take each ReLU that is the only reader of an `ImageConv2d` along with it."""
    for layer, once, relu in relus_after(traced):
        if once and isinstance(layer, ImageConv2d):
            layer.rectified = True
            traced.set_submodule(relu, Rectified())


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
