"""Convolutions of the attacked network by Winograd's algorithm: in float32 on the CPU, where arithmetic is the limit."""

from typing import Any

import torch
from torch import Tensor, nn

from fastdynat.ops import available_backends, winograd_conv3x3, winograd_weights
from fastdynat.ops.winograd import TILE

# Where it is the faster one; oneDNN's time over Winograd's on one AVX2 core, channels-last: 1.7 to 1.9 for ResNet-18's
# convolutions (64 channels at 32x32 to 512 at 4x4, batch 32), but 1.2 with 48 channels, 0.9 with 32, 0.4 with 3.
MIN_CHANNELS = 64
# With 128 channels 1.9 at 16x16, 1.2 at 14x14, 1.0 at 7x7 (1.6 with 512), 0.7 at 6x6, whose tiles hold 56 % outputs.
MIN_FILLED = 0.75
# With 512 channels 1.9 with 32 tiles, 1.1 with 8, 1.0 with 4: reading the weights, four times as many, takes over. With 128 on
# AVX-512 (oneDNN is faster there) 1.4 with 256 and more, but 1.0 to 1.2 with 128 of one tile per image, which made training of
# the network `small` 6 % slower: transforming weights and results costs more than that.
WIDE, MIN_TILES_WIDE, MIN_TILES = 256, 16, 256


class WinogradConv2d(nn.Conv2d):
    """What `use_winograd` makes of a convolution. Weight and bias are still its own: others may read them."""

    transformed: tuple[Tensor, Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """``nn.Conv2d.forward``, which itself takes the shapes and types that it is better at."""
        if not self._faster(x):
            return super().forward(x)
        out = winograd_conv3x3(x, *self.transformed, self.bias, backend="cpp")
        # As nn.Conv2d answers: contiguous ones may be viewed otherwise afterwards.
        last = any(t.is_contiguous(memory_format=torch.channels_last) for t in (x, self.weight))
        return out if last else out.contiguous()

    def _faster(self, x: Tensor) -> bool:
        if x.dim() != 4 or x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return False
        n, _, height, width = x.shape
        tiles = n * -(-height // TILE) * -(-width // TILE)
        least = MIN_TILES_WIDE if min(self.in_channels, self.out_channels) >= WIDE else MIN_TILES
        return tiles >= least and n * height * width >= MIN_FILLED * TILE**2 * tiles

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the weight of now, in place."""
        winograd_weights(self.weight, out=self.transformed, backend="cpp")


def use_winograd(network: nn.Module) -> list[WinogradConv2d]:
    """Change the convolutions of `network` that may become `WinogradConv2d`, in place; none without the extension.

    The layers themselves are changed, so that whoever calls them by whatever name finds them so. They need a `refresh` after
    every change of their weights.
    """
    if available_backends()["cpp"] is not None:
        return []
    changed = [module for module in network.modules() if _may(module)]
    for module in changed:
        module.__class__ = WinogradConv2d
        # Not a buffer: shallow copies of a module share the dictionary of their buffers.
        module.transformed = winograd_weights(module.weight, backend="cpp")  # type: ignore[arg-type, assignment]
    return changed  # type: ignore[return-value]


def _may(module: nn.Module) -> bool:
    layer: Any = module
    return (
        type(module) is nn.Conv2d
        and (layer.kernel_size, layer.stride, layer.dilation, layer.groups) == ((3, 3), (1, 1), (1, 1), 1)
        and (layer.padding, layer.padding_mode) in (((1, 1), "zeros"), ("same", "zeros"))
        and layer.weight.dtype == torch.float32
        and layer.weight.device.type == "cpu"
        and not layer.weight.requires_grad
        and min(layer.in_channels, layer.out_channels) >= MIN_CHANNELS
        # Hooks would still run, but what computes weights in them or calls something else is not ours to know.
        and not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))
    )
